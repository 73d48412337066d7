"""The bags of one part of one fold, in memory.

Reads splits.csv, the slide tables, the slide stores that they name, and the groups of the cohorts. Writes nothing.
Features stay in memory as they are stored (float16, half the memory); `to_device` casts them where they are used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from gmmamba.models.bag import Bag
from gmmamba.splits import read_slide_tables
from slidestore import StoreError, open_store
from slidestore.groups import SlideGroups, read_groups


class DataError(StoreError):
    """Files of one dataset that do not belong together; the message names the slide or file, and the remedy."""


@dataclass(frozen=True)
class LabelledBag:
    """A slide of a dataset. `label` is the index into the classes; bag.features are float16."""

    slide_id: str
    patient_id: str
    cohort: str
    bag: Bag
    label: int
    encoder_weights_sha256: str


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
        bag = Bag(torch.from_numpy(store.features), torch.from_numpy(store.coords), labels)
        sha = store.attributes.encoder_weights_sha256
        bags.append(LabelledBag(slide_id, row["patient_id"], cohort, bag, classes.index(row["label"]), sha or ""))
    return bags


def _labels_of(slide_id: str, coords: np.ndarray, path: Path, grouped: Mapping[str, SlideGroups]) -> torch.Tensor:
    """(N,) int64 group labels of a slide, after checking that the same patches were grouped."""
    remedy = "delete that file and let Snakemake write it anew"
    if slide_id not in grouped:
        raise DataError(f"slide {slide_id} is not in the groups {path}: {remedy}")
    grouped_coords, labels = grouped[slide_id]
    if not np.array_equal(grouped_coords, coords):
        raise DataError(f"slide {slide_id}: the coordinates in {path} are not those of its store: {remedy}")
    return torch.from_numpy(labels.astype(np.int64))


def encoder_weights(bags: Sequence[LabelledBag]) -> str:
    """The sha256 of the encoder's weights, which all bags must share."""
    first = bags[0]
    for bag in bags:
        if bag.encoder_weights_sha256 != first.encoder_weights_sha256:
            raise DataError(
                f"slides {first.slide_id} and {bag.slide_id} were encoded with different weights "
                f"({first.encoder_weights_sha256[:12]}, {bag.encoder_weights_sha256[:12]}): encode them anew"
            )
    return first.encoder_weights_sha256


def to_device(bag: Bag, device: torch.device) -> Bag:
    """The bag on `device`, its features (N, D) as float32; float16 is what travels."""
    moved = bag.to(device)
    return replace(moved, features=moved.features.float())
