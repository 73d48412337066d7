"""train: one experiment on one fold with one seed.

Reads splits.csv, stores and groups, and for the second of two stages the folder of the first. Writes into the run's
folder: history.csv (`epoch, train_loss, val_loss`, a val_<metric> each, `val_score`, which selects), model.safetensors
(the weights of the kept epoch) and, last, model.json (the experiment, what the model expects, which epoch was kept).

Repeatable: the same inputs give the same bits on the same device. The initial weights depend on the seed alone, the
order of the slides on seed and fold.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy

from gmmamba import __version__
from gmmamba.data import BagReader, LabelledBag, encoder_weights, load_bags
from gmmamba.metrics import classification_metrics
from gmmamba.models import create_model, has_first_stage
from gmmamba.models.bag import MILModel
from gmmamba.prediction import (
    check_belongs,
    check_run,
    choose_device,
    load_model,
    make_repeatable,
    predict_bags,
)
from gmmamba.protocol import BestEpoch, TrainingSettings, clip_gradients, make_optimizer
from slidestore.atomic import replace_when_whole
from slidestore.progress import progress_bar
from slidestore.settings import from_dict


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
    stage: int = 2,
    first_stage: Path | None = None,
) -> None:
    """Train `experiment` (name, method, model, grouping, training, encoder, classes) and write the run's folder.

    slide_tables, groups: cohort -> file. Up to `cache_mb` MB of features stay in memory between epochs. A method of two
    stages (models.TWO_STAGES) is trained with stage 1 first, then with the folder that this wrote as `first_stage`.
    Raises ValueError for impossible settings and a first stage that is missing or not asked for, DataError and
    StoreError for inputs that do not belong together, FloatingPointError when the loss stops being finite.
    """
    experiment = of_stage(experiment, stage, first_stage)
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
    if first_stage is not None:
        start_from(first_stage, fold, seed, model, training, reader)
    history, best, kept = fit(model, training, validation, settings, np.random.default_rng([seed, fold]), reader)

    with replace_when_whole(output_dir / "history.csv") as part:
        history.to_csv(part, index=False)
    with replace_when_whole(output_dir / "model.safetensors") as part:
        part.write_bytes(save(kept))  # save_file's would be readable by its owner alone
    card = {
        "experiment": experiment,
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


def of_stage(experiment: Mapping[str, Any], stage: int, first_stage: Path | None) -> dict[str, Any]:
    """The experiment as its stage is trained; ValueError unless it has such a stage, and the first where it starts from
    one."""
    name, method, model = experiment["name"], experiment["method"], experiment["model"]
    two = has_first_stage(method, model)
    if stage == 1 and not two:
        raise ValueError(f"experiment {name}: {method} has no first stage, train it without --stage 1")
    if two and (stage == 2) != (first_stage is not None):
        raise ValueError(
            f"experiment {name}: {method} trains in two stages: the first with --stage 1, without --first-stage, the "
            f"second with its folder as --first-stage"
        )
    if first_stage is not None and not two:
        raise ValueError(f"experiment {name}: {method} starts from no first stage, leave out --first-stage")
    return {**experiment, "model": {**model, "stage": 1}} if stage == 1 else dict(experiment)


def start_from(
    folder: Path, fold: int, seed: int, model: MILModel, training: list[LabelledBag], reader: BagReader
) -> None:
    """Hand the first stage in `folder`, and the training bags, to the model of the second."""
    first, card = load_model(folder)
    check_run(card, fold, seed, folder)
    check_belongs(card, training, folder)
    with torch.no_grad():
        model.start_from(first.to(reader.device), lambda: (bag for _, bag in reader.stream(training)))


def fit(
    model: MILModel,
    training: list[LabelledBag],
    validation: list[LabelledBag],
    settings: TrainingSettings,
    rng: np.random.Generator,
    reader: BagReader,
) -> tuple[pd.DataFrame, BestEpoch, dict[str, Tensor]]:
    """Train `model` in place; returns the history, the kept epoch and its weights (on the CPU)."""
    optimizer = make_optimizer(model, settings)
    best = BestEpoch(settings.select_after, settings.patience, settings.min_epochs)
    kept: dict[str, Tensor] = {}
    true = np.array([item.label for item in validation])
    rows: list[dict[str, float]] = []
    epochs = progress_bar(range(1, settings.epochs + 1), desc="training", unit="epochs")
    for epoch in epochs:
        slides = [training[i] for i in draw_slides(training, settings, rng)]
        train_loss = train_epoch(model, slides, optimizer, settings, reader, epoch)
        if not np.isfinite(train_loss):
            raise FloatingPointError(
                f"the training loss is {train_loss} in epoch {epoch}: lower training.learning_rate "
                f"({settings.learning_rate}), or use precision fp32"
            )
        logits, _ = predict_bags(model, validation, reader)
        val_loss = cross_entropy(logits, torch.from_numpy(true)).item()
        metrics = classification_metrics(true, logits.double().softmax(dim=1).numpy())
        score = settings.score(epoch, metrics, val_loss, logits.shape[1])
        rows.append(
            {"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss}
            | {f"val_{name}": value for name, value in metrics.items()}
            | {"val_score": score}
        )
        epochs.set_postfix(loss=f"{train_loss:.3f}", val=f"{score:.3f}", refresh=False)
        if best.update(epoch, score, val_loss):
            kept = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
        if best.should_stop(epoch):
            break
    return pd.DataFrame(rows), best, kept


def draw_slides(training: Sequence[LabelledBag], settings: TrainingSettings, rng: np.random.Generator) -> np.ndarray:
    """Indices of the slides of an epoch in their order: each once, or balanced (see TrainingSettings)."""
    if not settings.balanced:
        return rng.permutation(len(training))
    labels = np.array([item.label for item in training])
    weights = 1 / np.bincount(labels)[labels]
    return rng.choice(len(training), len(training), p=weights / weights.sum())


def train_epoch(
    model: MILModel,
    slides: Sequence[LabelledBag],
    optimizer: torch.optim.Optimizer,
    settings: TrainingSettings,
    reader: BagReader,
    epoch: int,
) -> float:
    """One pass over the slides in their order; returns the mean loss. Epochs count from 1."""
    model.train()
    total = torch.zeros((), device=reader.device)  # stays on the device: reading a loss a step would stall a GPU
    for step, (slide, bag) in enumerate(reader.stream(slides)):
        progress = (epoch - 1 + step / len(slides)) / settings.epochs
        with _autocast(settings, reader.device):
            loss = model.training_loss(bag, torch.tensor([slide.label], device=reader.device), progress)
        if step % settings.accumulation == 0:
            optimizer.zero_grad(set_to_none=True)
        (loss / settings.accumulation).backward()
        if (step + 1) % settings.accumulation == 0 or step + 1 == len(slides):
            if settings.clip_norm is not None:
                clip_gradients(model, settings.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate_at(epoch, progress)
            optimizer.step()
            model.after_step(progress)
        total += loss.detach()
    return total.item() / len(slides)


def _autocast(settings: TrainingSettings, device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
