"""Slides with features for the Python API (api.py): from arrays, from stores, or as the workflow prepared them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gmmamba.data import LabelledBag, encoder_weights
from gmmamba.grouping import group_coords, group_features, parse_grouping
from gmmamba.models.bag import Bag
from gmmamba.slide_tables import read_slide_tables
from gmmamba.splits import SplitSettings, drawn_parts
from slidestore import SlideStore, open_store

UNLABELLED = -1


@dataclass(frozen=True)
class ArraySlide(LabelledBag):
    """A slide whose features (N, D) float16 or float32 are in memory, without a store; coords (N, 2) or None."""

    store: SlideStore = field(init=False, repr=False)  # never set
    features: Tensor
    coords: NDArray[Any] | None

    def read(self) -> Bag:
        coords = np.zeros((len(self.features), 2), np.int32) if self.coords is None else self.coords
        return Bag(self.features, torch.from_numpy(coords), self.groups)


class Fold(NamedTuple):
    """The parts of a cohort; no patient is in two."""

    training: Cohort
    validation: Cohort
    test: Cohort


@dataclass(frozen=True)
class Cohort:
    """Slides with features, and what is known of them. Made by `from_arrays`, `from_stores` or `from_table`.

    classes: in order; of two, the second is the positive one. Empty where the slides have no labels.
    """

    slides: list[LabelledBag]
    classes: list[str]

    @classmethod
    def from_arrays(
        cls,
        features: Sequence[ArrayLike | Tensor],
        labels: Sequence[object] | None = None,
        coords: Sequence[ArrayLike | Tensor] | None = None,
        patients: Sequence[object] | None = None,
        slide_ids: Sequence[object] | None = None,
        classes: Sequence[object] | None = None,
    ) -> Cohort:
        """Features from anywhere: an (N, D) array a slide, kept in memory in float16 or float32.

        labels: the class of each slide. coords: an (N, 2) array a slide, (x, y) of its patches, in any unit. patients:
        whose slide it is; else each slide is a patient of its own. slide_ids: else "0", "1", … classes: their order;
        else that of the alphabet. Raises ValueError for what does not belong together or is not finite.
        """
        ids = [str(i) for i in (range(len(features)) if slide_ids is None else slide_ids)]
        places = [None] * len(features) if coords is None else list(coords)
        _check_lengths(len(features), coords=places, slide_ids=ids)
        slides = [
            ArraySlide(name, name, "arrays", UNLABELLED, None, _features(name, x), _coords(name, xy, len(x)))  # type: ignore[arg-type]
            for name, x, xy in zip(ids, features, places, strict=True)
        ]
        return _known(slides, labels, patients, classes)

    @classmethod
    def from_stores(
        cls,
        stores: Sequence[SlideStore | Path | str],
        labels: Sequence[object] | None = None,
        patients: Sequence[object] | None = None,
        classes: Sequence[object] | None = None,
    ) -> Cohort:
        """Stores of slides, opened or by path; features are read when they are needed. The rest as in `from_arrays`.

        Raises StoreError for what is no whole store, ValueError for the store of a slide that failed.
        """
        slides = []
        for store in stores:
            opened = store if isinstance(store, SlideStore) else open_store(store)
            about = opened.attributes
            if not len(opened.coords):
                why = (about.failure or {}).get("reason", "no patch shows tissue")
                raise ValueError(f"{opened.path} has no features ({why}): leave the slide out")
            slides.append(LabelledBag(about.slide_id, about.slide_id, about.cohort, UNLABELLED, opened, None))
        return _known(slides, labels, patients, classes)

    @classmethod
    def from_table(cls, tables: Path | str | Sequence[Path | str], classes: Sequence[object] | None = None) -> Cohort:
        """The slides that the workflow made features of: results/{cohort}/features/{encoder}.csv, of several cohorts
        a list. Labels and patients are the sheet's; failed and excluded slides are left out.
        """
        paths = [tables] if isinstance(tables, Path | str) else list(tables)
        table = read_slide_tables({str(path): Path(path) for path in paths})
        table = table[table["status"] == "ready"]
        for store, source in zip(table["store"], table["cohort"], strict=True):
            if not Path(store).exists():
                raise FileNotFoundError(
                    f"{store}, which {source} names, is not here: start Python in the folder that Snakemake ran in "
                    f"(this is {Path.cwd()})"
                )
        return cls.from_stores(table["store"].tolist(), table["label"].tolist(), table["patient_id"].tolist(), classes)

    def __len__(self) -> int:
        return len(self.slides)

    @property
    def slide_ids(self) -> list[str]:
        return [slide.slide_id for slide in self.slides]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(S,), indices into `classes`; -1 without a label."""
        return np.array([slide.label for slide in self.slides], np.int64)

    @property
    def in_dim(self) -> int:
        """D, of all slides. ValueError where they differ."""
        widths = {slide.slide_id: _width(slide) for slide in self.slides}
        if len(set(widths.values())) != 1:
            raise ValueError(f"the slides have features of different widths, {widths}: take those of one encoder")
        return next(iter(widths.values()))

    def subset(self, which: ArrayLike) -> Cohort:
        """The slides at these indices, or where this (S,) bool is true."""
        rows = np.asarray(which)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return Cohort([self.slides[i] for i in rows.tolist()], self.classes)

    def split(self, folds: int = 5, validation: float = 0.2, seed: int = 0) -> list[Fold]:
        """Patient-level folds, stratified by class: the test parts share out all patients, `validation` is the share of
        the others that the epoch is chosen by. As `split: {scheme: kfold}` draws them. SplitError where there are too
        few patients of a class.
        """
        rows = [(s.slide_id, s.patient_id, self._class_of(s)) for s in self.slides]
        table = pd.DataFrame(rows, columns=["slide_id", "patient_id", "label"])
        settings = SplitSettings(folds=folds, validation=validation, seed=seed)
        parts = [table["patient_id"].map(part) for part in drawn_parts(table, self.classes, settings)]
        return [Fold(*(self.subset((part == name).to_numpy()) for name in ("train", "val", "test"))) for part in parts]

    def _class_of(self, slide: LabelledBag) -> str:
        if slide.label == UNLABELLED:
            raise ValueError(f"slide {slide.slide_id} has no label: give `labels` when the cohort is made")
        return self.classes[slide.label]


def cohort_of(slides: Any, coords: Any) -> Cohort:
    """The cohort that `slides` are: one, or a single slide as its store or its features, with `coords` or without."""
    if isinstance(slides, Cohort | SlideStore | Path | str):
        if coords is not None:
            raise ValueError("coords are of features that are an array; a cohort and a store have their own")
        return slides if isinstance(slides, Cohort) else Cohort.from_stores([slides])
    return Cohort.from_arrays([slides], coords=None if coords is None else [coords])


def _known(
    slides: Sequence[LabelledBag],
    labels: Sequence[object] | None,
    patients: Sequence[object] | None,
    classes: Sequence[object] | None,
) -> Cohort:
    """The cohort of these slides, with their labels and patients."""
    names = None if labels is None else [str(label) for label in np.asarray(labels).tolist()]
    people = [slide.patient_id for slide in slides] if patients is None else [str(patient) for patient in patients]
    _check_lengths(len(slides), labels=slides if names is None else names, patients=people)
    ids = [slide.slide_id for slide in slides]
    if double := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(
            f"the slide {double[0]!r} is there {ids.count(double[0])} times: give each slide an id of its own"
        )
    if names is None:
        return Cohort([replace(s, patient_id=p) for s, p in zip(slides, people, strict=True)], [])
    order = sorted(set(names)) if classes is None else [str(name) for name in classes]
    if unknown := sorted(set(names) - set(order)):
        raise ValueError(f"the label {unknown[0]!r} is none of the classes {', '.join(order)}")
    return Cohort(
        [
            replace(slide, patient_id=patient, label=order.index(name))
            for slide, patient, name in zip(slides, people, names, strict=True)
        ],
        order,
    )


def _check_lengths(slides: int, **given: Sequence[object]) -> None:
    if not slides:
        raise ValueError("a cohort needs at least one slide")
    for name, values in given.items():
        if len(values) != slides:
            raise ValueError(f"there are {slides} slides and {len(values)} {name}: give one a slide")


def _features(name: str, given: Any) -> Tensor:
    features = given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(np.ascontiguousarray(given))
    if features.ndim != 2 or not len(features):
        raise ValueError(f"slide {name}: features are {tuple(features.shape)}, not (N, D) with N patches, one or more")
    if features.dtype not in (torch.float16, torch.float32):
        features = features.float()
    if not features.isfinite().all():
        raise ValueError(f"slide {name}: features are not finite (NaN or infinite): mend or leave out those patches")
    return features


def _coords(name: str, given: Any, patches: int) -> NDArray[Any] | None:
    if given is None:
        return None
    coords = np.asarray(given)
    if coords.shape != (patches, 2):
        raise ValueError(f"slide {name}: coords are {coords.shape}, features have {patches} rows: give ({patches}, 2)")
    return coords


def _width(slide: LabelledBag) -> int:
    return slide.features.shape[1] if isinstance(slide, ArraySlide) else slide.store.shape[1]


def weights_of(slides: Sequence[LabelledBag]) -> str:
    """The sha256 of the encoder's weights, "" where it is not known: that of arrays never is."""
    stored = [slide for slide in slides if not isinstance(slide, ArraySlide)]
    return encoder_weights(stored) if stored else ""


def with_groups(slides: Sequence[LabelledBag], grouping: str | None) -> list[LabelledBag]:
    """The slides with their groups, as the workflow's cohort stages make them."""
    if grouping is None:
        return [replace(slide, groups=None) for slide in slides]
    return [replace(slide, groups=torch.from_numpy(_group(slide, grouping).astype(np.int64))) for slide in slides]


def _group(slide: LabelledBag, grouping: str) -> NDArray[np.int16]:
    method, _, number = grouping.rpartition("-")
    if method == "features" and number.isdecimal():
        return group_features(slide.read().features.numpy(), int(number))
    method, n_groups = parse_grouping(grouping)
    if not isinstance(slide, ArraySlide):
        # Damaged patches have no row, but were grouped with the others, in row-major order.
        coords = np.concatenate([slide.store.coords, np.reshape(slide.store.attributes.damaged, (-1, 2))])
        order = np.lexsort((coords[:, 0], coords[:, 1]))
        labels = np.empty(len(coords), np.int16)
        labels[order] = group_coords(coords[order].astype(np.int32), method, n_groups)
        return labels[: slide.store.shape[0]]
    if slide.coords is None:
        raise ValueError(
            f"slide {slide.slide_id} has no coords, by which grouping {grouping!r} goes: give coords, or train with "
            f"grouping='features-{n_groups}', or with grouping=None for a method without groups"
        )
    return group_coords(slide.coords, method, n_groups)
