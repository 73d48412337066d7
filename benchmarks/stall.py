"""Why the published model stalls on small cohorts: what its mask drops and what its CSS keeps, before any training.

    python -m benchmarks.stall results/tiles1/features/ENCODER.csv results/tiles1/groups/location-10.npz foci.csv

The cohort is one of known tumour positions (foci.csv: gmmamba.foci). Prints a Markdown
table, a row for each seed of the initial weights, over the slides with tumour:

    tumour masked, other masked   share of those patches that the untrained mask head drops (M_r = 0.3)
    largest Q                     the largest weight of a group in CSS's association matrix, mean over slides
    Q without tumour              slides where that group has no tumour patch although others have
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.measure import markdown_table
from gmmamba.foci import read_foci
from gmmamba.models.bag import Bag
from gmmamba.models.gmmamba import PUBLISHED, GMMamba
from slidestore import open_store
from slidestore.groups import read_groups


def read_slides(table: Path, groups: Path, foci: Path) -> list[tuple[Bag, np.ndarray]]:
    """Each slide with tumour: its bag, and (N,) bool whether a patch covers the centre of a focus."""
    tumour_of = read_foci(foci)
    grouped, slides = read_groups(groups), []
    for row in pd.read_csv(table, dtype=str).itertuples():
        if (slide_id := str(row.slide_id)) in tumour_of and row.status == "ready":
            store = open_store(str(row.store))
            side = store.attributes.patch_px_level0
            assert side is not None
            centres = np.array([focus.centre for focus in tumour_of[slide_id]])
            offset = centres[None] - store.coords[:, None]  # (N, foci, 2)
            tumour = ((offset >= 0) & (offset < side)).all(2).any(1)
            labels = torch.from_numpy(grouped[slide_id][1]).long()
            features = torch.from_numpy(store.features).float()
            slides.append((Bag(features, torch.from_numpy(store.coords), labels), tumour))
    return slides


@torch.no_grad()
def initial_state(seed: int, slides: list[tuple[Bag, np.ndarray]]) -> list[str]:
    """A row of the table."""
    torch.manual_seed(seed)
    model = GMMamba(slides[0][0].features.shape[1], 2, **PUBLISHED).eval()
    masked, others, largest, missed = [], [], [], []
    for bag, tumour in slides:
        details = model(bag).details
        keep = torch.empty_like(details["keep"])
        keep[details["order"]] = details["keep"]
        masked.append(1 - keep.numpy()[tumour].mean())
        others.append(1 - keep.numpy()[~tumour].mean())
        largest.append(details["affinity"].max().item())
        assert bag.groups is not None
        first = bag.groups.unique()[details["affinity"].argmax()]
        missed.append(not tumour[(bag.groups == first).numpy()].any())
    means = (np.mean(values) for values in (masked, others, largest, missed))
    return [str(seed), *(f"{mean:.2f}" for mean in means)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stall", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", type=Path, help="slide table of the cohort")
    parser.add_argument("groups", type=Path)
    parser.add_argument("foci", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    slides = read_slides(options.table, options.groups, options.foci)
    rows = [initial_state(seed, slides) for seed in tqdm(range(options.seeds), desc="seeds", disable=None)]
    print(markdown_table(["seed", "tumour masked", "other masked", "largest Q", "Q without tumour"], rows))


if __name__ == "__main__":
    main()
