"""Training settings: each optimizer, schedule and selection is what its name says, and the defaults change nothing."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from gmmamba.data import BagReader
from gmmamba.models import create_model
from gmmamba.models.bag import Bag
from gmmamba.protocol import BestEpoch, TrainingSettings, clip_gradients, make_optimizer
from gmmamba.training import draw_slides, train_epoch

SETTINGS = TrainingSettings(learning_rate=1e-2, weight_decay=0.1)


@dataclasses.dataclass(frozen=True)
class Slide:
    """What training needs of a LabelledBag."""

    label: int
    bag: Bag
    slide_id: str = ""
    cohort: str = ""


def make_slides(count: int, label: Any = lambda i: i % 2) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        Slide(label(i), Bag(torch.randn(9, 16, generator=generator), torch.zeros(9, 2)), str(i)) for i in range(count)
    ]


class Memory(BagReader):
    def prepare(self, slide: Any) -> Bag:
        return slide.bag


def fresh() -> Any:
    torch.manual_seed(0)
    return create_model("abmil", 16, 2, width=8, dropout=0.0)


def trained(settings: TrainingSettings, slides: list[Any], epochs: int = 2) -> dict[str, torch.Tensor]:
    model = fresh()
    optimizer = make_optimizer(model, settings)
    for epoch in range(1, epochs + 1):
        train_epoch(model, slides, optimizer, settings, Memory(torch.device("cpu"), 0), epoch)
    return model.state_dict()


def by_hand(slides: list[Any], make: Any, batch: int = 1, epochs: int = 2) -> dict[str, torch.Tensor]:
    model = fresh()
    optimizer = make(model)
    for _ in range(epochs):
        for start in range(0, len(slides), batch):
            optimizer.zero_grad()
            for slide in slides[start : start + batch]:
                loss = cross_entropy(model(slide.bag).logits, torch.tensor([slide.label])) / batch
                loss.backward()
            optimizer.step()
    return model.state_dict()


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    ("changed", "make"),
    [
        ({}, lambda m: torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=0.1, fused=True)),
        ({"optimizer": "adam", "betas": [0.5, 0.9]},
         lambda m: torch.optim.Adam(m.parameters(), 1e-2, (0.5, 0.9), weight_decay=0.1, fused=True)),
        ({"decay_vectors": False},
         lambda m: torch.optim.AdamW([{"params": [p for p in m.parameters() if p.ndim > 1]},
                                      {"params": [p for p in m.parameters() if p.ndim < 2], "weight_decay": 0.0}],
                                     1e-2, weight_decay=0.1, fused=True)),
    ],
)  # fmt: skip
def test_training_is_the_optimizers_own_to_the_last_bit(changed: dict[str, Any], make: Any) -> None:
    slides = make_slides(5)
    assert_equal(trained(dataclasses.replace(SETTINGS, **changed), slides), by_hand(slides, make))


def test_accumulated_slides_make_one_step() -> None:
    slides = make_slides(5)  # the last step is of one slide
    expected = by_hand(slides, lambda m: torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=0.1, fused=True), batch=2)
    assert_equal(trained(dataclasses.replace(SETTINGS, accumulation=2), slides), expected)


@pytest.mark.parametrize("name", ["lookahead_radam", "lookahead_adam"])
def test_lookahead_goes_half_the_way_every_six_steps(name: str) -> None:
    slides, settings = make_slides(6), dataclasses.replace(SETTINGS, optimizer=name)  # type: ignore[arg-type]
    start, ahead = fresh().state_dict(), trained(settings, slides, epochs=1)
    if name == "lookahead_adam":
        fast = trained(dataclasses.replace(SETTINGS, optimizer="adam"), slides, epochs=1)
    else:
        fast = by_hand(
            slides, lambda m: torch.optim.RAdam(m.parameters(), 1e-2, weight_decay=0.1, decoupled_weight_decay=True),
            epochs=1,
        )  # fmt: skip
    for key, value in ahead.items():
        torch.testing.assert_close(value, (start[key] + fast[key]) / 2)
    five = trained(settings, slides[:5], epochs=1)
    assert_equal(five, trained(settings, slides[:5], epochs=1))
    assert any(not torch.allclose(five[key], ahead[key]) for key in ahead)


def test_learning_rates() -> None:
    def rates(schedule: Any, steps: int = 4) -> list[float]:
        settings = TrainingSettings(epochs=10, learning_rate=1.0, end_rate=0.2, schedule=schedule)
        return [
            settings.rate_at(epoch, (epoch - 1 + step / steps) / 10) for epoch in range(1, 11) for step in range(steps)
        ]

    assert rates("constant") == [1.0] * 40
    assert rates("step") == [1.0] * 20 + [0.2] * 20
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.2)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        annealing.step()
    np.testing.assert_allclose(rates("cosine"), expected)
    np.testing.assert_allclose(rates("cosine_epochs"), np.repeat(expected[::4], 4))
    # ... and they reach the optimizer: at rate 0 nothing is learnt.
    still = dataclasses.replace(SETTINGS, schedule="step", epochs=10, select_after=1)
    assert_equal(trained(still, make_slides(3), epochs=9), trained(still, make_slides(3), epochs=5))


def test_balanced_epochs_draw_each_class_as_often() -> None:
    slides = make_slides(40, lambda i: int(i < 4))
    rng = np.random.default_rng(0)
    plain = [slides[i].label for i in draw_slides(slides, TrainingSettings(), rng)]
    assert sorted(plain) == [0] * 36 + [1] * 4
    drawn = [draw_slides(slides, TrainingSettings(balanced=True), rng) for _ in range(50)]
    assert all(len(epoch) == 40 for epoch in drawn)
    assert np.mean([slides[i].label for epoch in drawn for i in epoch]) == pytest.approx(0.5, abs=0.05)


def test_the_gradient_of_each_part_is_clipped() -> None:
    model = fresh()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    for parameter in model.classifier.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    clip_gradients(model, 5.0)
    norms = {name: torch.cat([p.grad.flatten() for p in part.parameters()]).norm().item()
             for name, part in model.named_children()}  # fmt: skip
    assert norms.pop("classifier") < 0.1
    assert all(norm == pytest.approx(5.0, rel=1e-4) for norm in norms.values())


@pytest.mark.parametrize(("selection", "kept"), [("f1_auroc", 2), ("auroc", 3), ("loss", 1), ("last", 4)])
def test_what_selects_the_epoch(selection: Any, kept: int) -> None:
    settings = TrainingSettings(selection=selection, select_after=0)
    best = BestEpoch(0, 20, 50)
    history = [(0.5, 0.6, 0.1), (0.9, 0.7, 0.3), (0.6, 0.8, 0.2), (0.5, 0.5, 0.9)]
    for epoch, (f1, auroc, loss) in enumerate(history, start=1):
        best.update(epoch, settings.score(epoch, {"f1_positive": f1, "auroc": auroc}, loss, 2), loss)
    assert best.epoch == kept


@pytest.mark.parametrize("key", ["optimizer", "schedule", "selection"])
def test_unknown_names_are_errors(key: str) -> None:
    with pytest.raises(ValueError, match=f"unknown training.{key} 'adma'"):
        TrainingSettings(**{key: "adma"})
