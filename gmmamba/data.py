"""The bags of one part of one fold.

Reads splits.csv, the slide tables, the slide stores that they name, and the groups of the cohorts. Writes nothing.
`load_bags` reads everything but the features, which `BagReader` reads when their slide is next.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from gmmamba.models.bag import Bag
from gmmamba.slide_tables import read_slide_tables
from slidestore import SlideStore, StoreError, open_store
from slidestore.groups import SlideGroups, read_groups


class DataError(StoreError):
    """Files of one dataset that do not belong together; the message names the slide or file, and the remedy."""


@dataclass(frozen=True)
class LabelledBag:
    """A slide of a dataset. `label` is the index into the classes, `groups` (N,) int64 or None."""

    slide_id: str
    patient_id: str
    cohort: str
    label: int
    store: SlideStore
    groups: torch.Tensor | None

    def read(self) -> Bag:
        """The slide's bag, read from its store; features are float16, as stored."""
        return Bag(torch.from_numpy(self.store.read_features()), torch.from_numpy(self.store.coords), self.groups)


def load_bags(
    splits: Path,
    fold: int,
    part: Literal["train", "val", "test"],
    slide_tables: Mapping[str, Path],
    groups: Mapping[str, Path] | None,
    encoder: str,
    classes: Sequence[str],
) -> list[LabelledBag]:
    """The slides of one part of a fold, in the order of splits.csv.

    slide_tables, groups: cohort -> file; groups is None for models that use none. Raises StoreError for a store
    that is damaged or of another encoder, DataError for one whose patches are not those that were grouped.
    """
    table = pd.read_csv(splits, dtype=str, keep_default_na=False)
    if f"fold{fold}" not in table:
        raise DataError(f"{splits} has no fold {fold}: its columns are {', '.join(table.columns)}")
    unknown = sorted(set(table["label"]) - set(classes))
    if unknown:
        raise DataError(
            f"{splits} has the label {unknown[0]!r}, which is none of {', '.join(classes)}: use its classes"
        )
    stores = read_slide_tables(slide_tables).set_index(["cohort", "slide_id"])["store"]
    grouped = {cohort: (path, read_groups(path)) for cohort, path in groups.items()} if groups else None

    bags = []
    members = table[table[f"fold{fold}"] == part]
    for row in members[["slide_id", "patient_id", "cohort", "label"]].to_dict("records"):
        slide_id, cohort = row["slide_id"], row["cohort"]
        store = open_store(Path(stores[cohort, slide_id]), encoder)
        labels = _labels_of(slide_id, store.coords, *grouped[cohort]) if grouped else None
        bags.append(LabelledBag(slide_id, row["patient_id"], cohort, classes.index(row["label"]), store, labels))
    return bags


def _labels_of(slide_id: str, coords: np.ndarray, path: Path, grouped: Mapping[str, SlideGroups]) -> torch.Tensor:
    """(N,) int64 group labels of a slide, whose damaged patches have a group and no features."""
    remedy = "delete that file and let Snakemake write it anew"
    if slide_id not in grouped:
        raise DataError(f"slide {slide_id} is not in the groups {path}: {remedy}")
    grouped_coords, labels = grouped[slide_id]
    order, wanted = _keys(grouped_coords), _keys(coords)  # both ascend: patches are row-major
    rows = np.searchsorted(order, wanted).clip(max=len(order) - 1)
    if not np.array_equal(order[rows], wanted):
        raise DataError(f"slide {slide_id}: the coordinates in {path} are not those of its store: {remedy}")
    return torch.from_numpy(labels[rows].astype(np.int64))


def _keys(coords: np.ndarray) -> np.ndarray:
    """(N,) int64, one number a place, ascending in row-major order."""
    return coords[:, 1].astype(np.int64) << 32 | coords[:, 0].astype(np.int64)


def encoder_weights(bags: Sequence[LabelledBag]) -> str:
    """The sha256 of the encoder's weights, which all bags must share."""
    shas = [bag.store.attributes.encoder_weights_sha256 or "" for bag in bags]
    for bag, sha in zip(bags, shas, strict=True):
        if sha != shas[0]:
            raise DataError(
                f"slides {bags[0].slide_id} and {bag.slide_id} were encoded with different weights "
                f"({shas[0][:12]}, {sha[:12]}): encode them anew"
            )
    return shas[0]


class BagReader:
    """Bags on a device. Each slide is read once and kept in memory, in float16, while what is kept fits `budget` bytes;
    beyond that, slides are read at every use. A thread prepares the next bag while the model works on this one."""

    def __init__(self, device: torch.device, budget: int):
        self.device, self.left = device, budget
        self.kept: dict[tuple[str, str], Bag] = {}

    def stream(self, slides: Sequence[LabelledBag]) -> Iterator[tuple[LabelledBag, Bag]]:
        """Each slide with its bag on the device, features (N, D) float32."""
        with ThreadPoolExecutor(1) as thread:
            coming = [thread.submit(self.prepare, slide) for slide in slides[:1]]
            for slide, following in zip(slides, [*slides[1:], None], strict=True):
                bag = coming.pop().result()
                if following is not None:
                    coming.append(thread.submit(self.prepare, following))
                yield slide, bag

    def prepare(self, slide: LabelledBag) -> Bag:
        key = slide.cohort, slide.slide_id
        bag = self.kept.get(key)
        if bag is None:
            bag = slide.read()
            if self.device.type == "cuda":
                bag.features = bag.features.pin_memory()  # copied while the GPU computes
            if bag.features.nbytes <= self.left:
                self.left -= bag.features.nbytes
                self.kept[key] = bag
        moved = bag.to(self.device)
        moved.features = moved.features.float()
        return moved
