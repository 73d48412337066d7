"""train: one experiment on one fold with one seed (protocol: GMMAMBA.md, section 7).

Reads splits.csv, stores and groups. Writes into the run's folder: history.csv (`epoch, train_loss, val_loss`, a
val_<metric> each, `val_score`), model.safetensors (the weights of the kept epoch) and, last, model.json (the
experiment, what the model expects, which epoch was kept and why).

Repeatable: the same inputs give the same bits on the same device. The initial weights depend on the seed alone, the
order of the slides on seed and fold.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from gmmamba import __version__
from gmmamba.data import BagReader, LabelledBag, encoder_weights, load_bags
from gmmamba.metrics import classification_metrics, selection_score
from gmmamba.models import create_model
from gmmamba.models.bag import MILModel
from gmmamba.prediction import choose_device, make_repeatable, predict_bags
from slidestore.atomic import replace_when_whole
from slidestore.settings import from_dict


@dataclass(frozen=True)
class TrainingSettings:
    """AdamW at a constant rate, one slide a step.

    select_after  the first epochs whose weights are never kept
    patience      epochs without a better validation score after which training stops,
    min_epochs    though not before this many are done and one more
    precision     bf16: matrix products of training in bfloat16; validation and prediction are always fp32
    """

    epochs: int = 100
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    select_after: int = 5
    patience: int = 20
    min_epochs: int = 50
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.epochs <= self.select_after:
            raise ValueError(
                f"training.epochs {self.epochs} must be above training.select_after {self.select_after}: no epoch "
                f"could be kept; raise epochs"
            )


class BestEpoch:
    """Which epoch is kept, and when to stop. Epochs count from 1.

    epoch, score, loss: the kept one's; epoch is 0 before any was eligible. first: the earliest of that score, from
    which patience counts.
    """

    def __init__(self, select_after: int, patience: int, min_epochs: int) -> None:
        self.select_after, self.patience, self.min_epochs = select_after, patience, min_epochs
        self.epoch, self.score, self.loss, self.first = 0, -np.inf, np.inf, 0

    def update(self, epoch: int, score: float, loss: float) -> bool:
        """Take in the validation score and loss of `epoch`; True where it is the best so far.

        Of equal scores, the usual case where few slides validate, the one of lower loss is better.
        """
        if epoch <= self.select_after or (score, -loss) <= (self.score, -self.loss):
            return False
        if score > self.score:
            self.first = epoch
        self.epoch, self.score, self.loss = epoch, score, loss
        return True

    def should_stop(self, epoch: int) -> bool:
        """Whether training ends after `epoch`."""
        return epoch > self.min_epochs and epoch - max(self.first, self.select_after) >= self.patience


def train(
    experiment: Mapping[str, Any],
    fold: int,
    seed: int,
    splits: Path,
    slide_tables: Mapping[str, Path],
    groups: Mapping[str, Path] | None,
    output_dir: Path,
    threads: int,
    cache_mb: int = 2000,
) -> None:
    """Train `experiment` (name, method, model, grouping, training, encoder, classes) and write the run's folder.

    slide_tables, groups: cohort -> file. Up to `cache_mb` MB of features stay in memory between epochs. Raises
    ValueError for impossible settings, DataError and StoreError for
    inputs that do not belong together, FloatingPointError when the loss stops being finite.
    """
    settings = from_dict(TrainingSettings, experiment["training"], f"experiment {experiment['name']}, training")
    make_repeatable(seed, threads)
    device = choose_device()
    classes, encoder = experiment["classes"], experiment["encoder"]
    training = load_bags(splits, fold, "train", slide_tables, groups, encoder, classes)
    validation = load_bags(splits, fold, "val", slide_tables, groups, encoder, classes)
    weights_sha256 = encoder_weights(training + validation)
    in_dim = training[0].store.shape[1]

    model = create_model(experiment["method"], in_dim, len(classes), **experiment["model"]).to(device)
    reader = BagReader(device, budget=cache_mb * 1_000_000)
    history, best, kept = fit(model, training, validation, settings, np.random.default_rng([seed, fold]), reader)

    with replace_when_whole(output_dir / "history.csv") as part:
        history.to_csv(part, index=False)
    with replace_when_whole(output_dir / "model.safetensors") as part:
        save_file(kept, part)
    card = {
        "experiment": dict(experiment),
        "fold": fold,
        "seed": seed,
        "in_dim": in_dim,
        "classes": classes,
        "encoder": encoder,
        "encoder_weights_sha256": weights_sha256,
        "best_epoch": best.epoch,
        "validation_score": best.score,
        "epochs_run": len(history),
        "gmmamba_version": __version__,
        "torch_version": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    with replace_when_whole(output_dir / "model.json") as part:
        part.write_text(json.dumps(card, indent=2) + "\n")


def fit(
    model: MILModel,
    training: list[LabelledBag],
    validation: list[LabelledBag],
    settings: TrainingSettings,
    rng: np.random.Generator,
    reader: BagReader,
) -> tuple[pd.DataFrame, BestEpoch, dict[str, Tensor]]:
    """Train `model` in place; returns the history, the kept epoch and its weights (on the CPU)."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    best = BestEpoch(settings.select_after, settings.patience, settings.min_epochs)
    kept: dict[str, Tensor] = {}
    true = np.array([item.label for item in validation])
    rows: list[dict[str, float]] = []
    progress = tqdm(range(1, settings.epochs + 1), desc="epochs", disable=None)  # None: quiet without a terminal
    for epoch in progress:
        shuffled = [training[i] for i in rng.permutation(len(training))]
        train_loss = train_epoch(model, shuffled, optimizer, settings, reader, epoch)
        if not np.isfinite(train_loss):
            raise FloatingPointError(
                f"the training loss is {train_loss} in epoch {epoch}: lower training.learning_rate "
                f"({settings.learning_rate}), or use precision fp32"
            )
        logits, _ = predict_bags(model, validation, reader)
        val_loss = cross_entropy(logits, torch.from_numpy(true)).item()
        metrics = classification_metrics(true, logits.double().softmax(dim=1).numpy())
        score = selection_score(metrics, logits.shape[1])
        rows.append(
            {"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss}
            | {f"val_{name}": value for name, value in metrics.items()}
            | {"val_score": score}
        )
        progress.set_postfix(loss=f"{train_loss:.3f}", val=f"{score:.3f}")
        if best.update(epoch, score, val_loss):
            kept = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
        if best.should_stop(epoch):
            break
    return pd.DataFrame(rows), best, kept


def train_epoch(
    model: MILModel,
    slides: Sequence[LabelledBag],
    optimizer: torch.optim.Optimizer,
    settings: TrainingSettings,
    reader: BagReader,
    epoch: int,
) -> float:
    """One pass over the slides in their order, a step each; returns the mean loss. Epochs count from 1."""
    model.train()
    total = torch.zeros((), device=reader.device)  # stays on the device: reading a loss a step would stall a GPU
    for step, (slide, bag) in enumerate(reader.stream(slides)):
        progress = (epoch - 1 + step / len(slides)) / settings.epochs
        with _autocast(settings, reader.device):
            loss = model.training_loss(bag, torch.tensor([slide.label], device=reader.device), progress)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        model.after_step(progress)
        total += loss.detach()
    return total.item() / len(slides)


def _autocast(settings: TrainingSettings, device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
