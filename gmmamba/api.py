"""The Python API (docs/api.md): features in, predictions out. What `gmmamba` exports is here.

A thin layer over what the workflow's jobs call (data, training, prediction, inference): features, weights and digits
are the same. Reads stores, slide tables and trained models; writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gmmamba.api_cohort import UNLABELLED, Cohort, cohort_of, weights_of, with_groups
from gmmamba.data import BagReader, DataError
from gmmamba.inference.explain import mean_attention
from gmmamba.inference.model_file import load_ensemble
from gmmamba.models import create_model
from gmmamba.models.bag import Bag, MILModel
from gmmamba.prediction import choose_device, make_repeatable, predict_bags
from gmmamba.protocol import TrainingSettings
from gmmamba.training import fit
from slidestore import SlideStore
from slidestore import open_store as open_slide_store
from slidestore.settings import from_dict

__all__ = [
    "Cohort", "Predictions", "TrainedModel", "create_model", "load_models", "open_slide_store", "predict", "train",
]  # fmt: skip


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, and what prediction must know of it.

    grouping: how its slides are grouped, such as "location-10"; None: each is one group. encoder_weights_sha256: of the
    features that it was trained on, "" where that is not known. history: a row an epoch, as history.csv; None where the
    model was loaded.
    """

    model: MILModel
    classes: list[str]
    in_dim: int
    grouping: str | None
    encoder_weights_sha256: str
    best_epoch: int
    validation_score: float
    history: pd.DataFrame | None = None


@dataclass(frozen=True)
class Predictions:
    """What one or more models say of slides. Shapes: S slides, M models, C classes, N patches of a slide.

    members (M, S, C) float64: the probabilities of each model. attention: of each slide (N,) float64, the mean of the
    models', which sums to 1; None for models that have none. true: labels, where they are known.
    """

    slide_ids: list[str]
    classes: list[str]
    members: NDArray[np.float64]
    attention: list[NDArray[np.float64] | None]
    true: list[str | None]

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """(S, C), the mean over the models."""
        return self.members.mean(axis=0)

    @property
    def predicted(self) -> list[str]:
        """The most probable class of each slide."""
        return [self.classes[i] for i in self.probabilities.argmax(axis=1)]

    @property
    def table(self) -> pd.DataFrame:
        """A row a slide: slide_id, true, predicted, prob_<class>."""
        known = pd.DataFrame({"slide_id": self.slide_ids, "true": self.true, "predicted": self.predicted})
        return known.join(pd.DataFrame(self.probabilities, columns=[f"prob_{name}" for name in self.classes]))


def train(
    model: MILModel,
    training: Cohort,
    validation: Cohort,
    *,
    grouping: str | None = "location-10",
    seed: int = 0,
    fold: int = 0,
    first_stage: TrainedModel | None = None,
    device: str | torch.device | None = None,
    threads: int = 1,
    cache_mb: int = 2000,
    **settings: Any,
) -> TrainedModel:
    """Train `model` in place, as the workflow does; it ends with the weights of the epoch that `validation` chose.

    model: of `create_model`, or any MILModel. grouping: "location-G", "random-G", "sequential-G", "features-G", or None
    for methods without groups. seed, fold: the order of the slides; what else is random goes on from torch's random
    state, so that torch.manual_seed(seed) before `create_model` gives the weights of the workflow's run of that seed
    and fold. first_stage: of ibmil and mhim, trained before with `stage=1`. device: else the GPU, if there is one.
    threads: on the CPU; digits depend on it, and the workflow has 1. cache_mb: features that stay in memory between
    epochs. settings: those of `training` in the configuration, such as epochs=30 (gmmamba.protocol.TrainingSettings).

    Raises ValueError for impossible settings and cohorts, DataError for features of different encoders,
    FloatingPointError when the loss stops being finite.
    """
    chosen = from_dict(TrainingSettings, settings, "train")
    for name, part in {"training": training, "validation": validation}.items():
        _check_classes(name, part, training.classes)
    if first_stage is not None and type(model).start_from is MILModel.start_from:
        raise ValueError(f"{type(model).__name__} starts from no first stage: leave first_stage out")
    everything = Cohort(training.slides + validation.slides, training.classes)
    in_dim, weights = everything.in_dim, weights_of(everything.slides)
    with _as_in_a_job(threads):
        on = choose_device() if device is None else torch.device(device)
        reader = BagReader(on, budget=cache_mb * 1_000_000)
        learnt, held_out = (with_groups(part.slides, grouping) for part in (training, validation))
        _check_fits(model.to(on), reader.prepare(learnt[0]), training.classes)
        if first_stage is not None:
            with torch.no_grad():
                model.start_from(first_stage.model.to(on), lambda: (bag for _, bag in reader.stream(learnt)))
        history, best, kept = fit(model, learnt, held_out, chosen, np.random.default_rng([seed, fold]), reader)
    model.load_state_dict(kept)
    return TrainedModel(
        model.eval(), training.classes, in_dim, grouping, weights, best.epoch, float(best.score), history
    )


def load_models(path: Path | str, runs: Sequence[str] | None = None) -> list[TrainedModel]:
    """The models that the workflow trained: of results/{dataset}/{experiment} (all folds and seeds), of one run's
    folder, or of a file that `gmmamba export-model` wrote. runs: these only, such as ["fold0_seed0"]. InferenceError
    for anything else.
    """
    ensemble = load_ensemble(Path(path), runs)
    card = ensemble.card
    return [
        TrainedModel(
            member.model,
            ensemble.classes,
            card["in_dim"],
            ensemble.grouping,
            card["encoder_weights_sha256"],
            about["best_epoch"],
            about["validation_score"],
        )
        for member, about in zip(ensemble.members, card["members"], strict=True)
    ]


def predict(
    models: TrainedModel | Path | str | Sequence[TrainedModel],
    slides: Cohort | SlideStore | Path | str | ArrayLike | Tensor,
    coords: ArrayLike | Tensor | None = None,
    *,
    device: str | torch.device | None = None,
    threads: int = 1,
) -> Predictions:
    """Predict slides by one model, by several as an ensemble, or by what `load_models` finds at a path.

    slides: a cohort, or one slide: its store (opened, or the path), or its features (N, D), then with its coords (N, 2)
    where the models group by location. device, threads: as for `train`.

    Raises ValueError for models that are no ensemble and features of another width, DataError for those of other
    encoder weights than the models were trained on.
    """
    members = load_models(models) if isinstance(models, Path | str) else models
    members = [members] if isinstance(members, TrainedModel) else list(members)
    _check_ensemble(members)
    first = members[0]
    cohort = cohort_of(slides, coords)
    if cohort.in_dim != first.in_dim:
        raise ValueError(f"the features have width {cohort.in_dim}, the model takes {first.in_dim}: use its encoder")
    weights = weights_of(cohort.slides)
    if weights and first.encoder_weights_sha256 and weights != first.encoder_weights_sha256:
        raise DataError(
            f"the features are of an encoder with weights {weights[:12]}, the model was trained on those with "
            f"{first.encoder_weights_sha256[:12]}: encode the slides with its encoder"
        )
    with _as_in_a_job(threads):
        on = choose_device() if device is None else torch.device(device)
        reader = BagReader(on, budget=2_000_000_000 if len(members) > 1 else 0)
        grouped = with_groups(cohort.slides, first.grouping)
        said = [predict_bags(member.model.to(on), grouped, reader) for member in members]
    probabilities = np.stack(
        [logits.double().softmax(dim=1).numpy() for logits, _ in said]
    )  # as prediction.py has them
    attention = [mean_attention(of_slide) for of_slide in zip(*(found for _, found in said), strict=True)]
    true = [None if slide.label == UNLABELLED else cohort.classes[slide.label] for slide in cohort.slides]
    return Predictions(cohort.slide_ids, first.classes, probabilities, attention, true)


# Checks --------------------------------------------------------------------------------------------------------------


def _check_classes(name: str, cohort: Cohort, classes: list[str]) -> None:
    if not cohort.classes:
        raise ValueError(f"the {name} slides have no labels: give `labels` when the cohort is made")
    if cohort.classes != classes:
        raise ValueError(f"the {name} slides have the classes {', '.join(cohort.classes)}, not {', '.join(classes)}")
    for index, of_class in enumerate(classes):
        if index not in cohort.labels:
            raise ValueError(f"no {name} slide is {of_class!r}: take slides of every class, as Cohort.split does")


def _check_fits(model: MILModel, bag: Bag, classes: list[str]) -> None:
    """A look at a few patches: a model of too many classes would be trained without a word."""
    few = Bag(bag.features[:8], bag.coords[:8], None if bag.groups is None else bag.groups[:8])
    width, name = few.features.shape[1], type(model).__name__
    try:
        with torch.no_grad(), torch.random.fork_rng():
            logits = model.eval()(few).logits
    except RuntimeError as error:
        raise ValueError(
            f"{name} does not take features of width {width}, make it with in_dim={width}: {error}"
        ) from error
    if logits.shape != (1, len(classes)):
        raise ValueError(
            f"{name} has {logits.shape[-1]} classes, the slides {', '.join(classes)}: n_classes={len(classes)}"
        )


def _check_ensemble(members: Sequence[TrainedModel]) -> None:
    if not members:
        raise ValueError("predict needs at least one model")
    for member in members:
        if not isinstance(member, TrainedModel):
            raise TypeError(
                f"predict takes what `train` or `load_models` returned, not a {type(member).__name__}, which does not "
                "say its classes and grouping"
            )
        for key in ("classes", "in_dim", "grouping", "encoder_weights_sha256"):
            if getattr(member, key) != getattr(members[0], key):
                raise ValueError(f"the models differ in {key}: they make no ensemble, predict by each on its own")


@contextmanager
def _as_in_a_job(threads: int) -> Iterator[None]:
    """torch's settings as the workflow's jobs have them; afterwards as they were."""
    had = torch.get_num_threads()
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, benchmark = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark  # type: ignore[attr-defined]
    with torch.random.fork_rng():  # make_repeatable seeds, too
        make_repeatable(0, threads)
    try:
        yield
    finally:
        torch.set_num_threads(had)
        torch.use_deterministic_algorithms(strict, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = benchmark
