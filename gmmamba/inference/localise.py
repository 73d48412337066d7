"""localise: how well attention, contributions and evidence find known foci, slide by slide.

Reads foci.csv (gmmamba.foci). Of an experiment's folder, or one run's, the test slides of every run are
measured, with their own class as the one that contributions are of; of a folder that `gmmamba predict` wrote, its
slides, with the maps that are there.

Writes a CSV, a row a slide and run: `slide_id, fold, seed, patches, positives`, and for each map its `<map>_auroc`,
`<map>_ap` (average precision), `<map>_top` (whether the patch of the highest value is a positive) and, of models with
groups, `<map>_group_top`: in what share of the groups with positives and others their highest patch is a positive, and
`group_chance`, in what share a patch drawn at random would be. A patch is positive if at least `min_share` of its area
is in foci. Slides without positives, or of nothing else, are left out.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from gmmamba.data import BagReader, load_bags
from gmmamba.foci import Focus, read_foci
from gmmamba.inference.explain import patch_contributions, patch_evidence
from gmmamba.inference.model_file import run_folders
from gmmamba.inference.pipeline import InferenceError
from gmmamba.prediction import choose_device, load_model, make_repeatable
from slidestore.atomic import replace_when_whole
from slidestore.progress import progress_bar

SAMPLES = 16  # points along a side of a patch, by which its area in foci is measured
MAPS = ("attention", "contribution", "evidence")


def localise(folder: Path, foci: Path, output: Path, min_share: float = 0.25) -> str:
    """Write the CSV, and return the means over slides in words. InferenceError where nothing can be measured."""
    of_slide = read_foci(foci)
    of_predictions = (folder / "predictions.csv").is_file() and (folder / "slides").is_dir()
    maps = _of_predictions(folder, of_slide) if of_predictions else _of_runs(folder, of_slide)
    rows = []
    for row, coords, side, groups, values in maps:
        positive = in_foci(coords, side, of_slide[row["slide_id"]]) >= min_share
        if positive.all() or not positive.any():
            continue
        row |= {"patches": len(coords), "positives": int(positive.sum())}
        for name, found in values.items():
            row[f"{name}_auroc"] = roc_auc_score(positive, found)
            row[f"{name}_ap"] = average_precision_score(positive, found)
            row[f"{name}_top"] = bool(positive[found.argmax()])
        row |= {} if groups is None else _in_groups(positive, groups, values)
        rows.append(row)
    if not rows:
        raise InferenceError(f"{foci} has no focus in a slide of {folder}: are they of the same slides?")
    measured = pd.DataFrame(rows)
    with replace_when_whole(output) as part:
        measured.to_csv(part, index=False)
    return _summary(measured)


def in_foci(coords: NDArray[np.int32], side: float, foci: Sequence[Focus]) -> NDArray[np.float64]:
    """The share (N,) of each patch's area that lies in foci. coords (N, 2), side: level-0 pixels."""
    steps = (np.arange(SAMPLES) + 0.5) / SAMPLES * side
    x = coords[:, 0, None, None] + steps[None, None, :]
    y = coords[:, 1, None, None] + steps[None, :, None]
    inside = np.zeros((len(coords), SAMPLES, SAMPLES), bool)
    for focus in foci:
        if focus.kind == "side":
            right, bottom = focus.x + focus.length, focus.y + focus.length
            inside |= (x >= focus.x) & (x < right) & (y >= focus.y) & (y < bottom)
        else:
            inside |= (x - focus.x) ** 2 + (y - focus.y) ** 2 < focus.length**2
    share: NDArray[np.float64] = inside.mean(axis=(1, 2))
    return share


def _in_groups(
    positive: NDArray[np.bool_], groups: NDArray[np.int64], values: Mapping[str, NDArray[np.float64]]
) -> dict[str, float]:
    members = [np.flatnonzero(groups == label) for label in np.unique(groups)]
    mixed = [rows for rows in members if positive[rows].any() and not positive[rows].all()]
    if not mixed:
        return {}
    tops = {name: np.mean([positive[rows[found[rows].argmax()]] for rows in mixed]) for name, found in values.items()}
    chance = float(np.mean([positive[rows].mean() for rows in mixed]))
    return {"group_chance": chance, **{f"{name}_group_top": float(share) for name, share in tops.items()}}


Measured = tuple[dict[str, Any], NDArray[np.int32], float, NDArray[np.int64] | None, dict[str, NDArray[np.float64]]]


def _of_predictions(folder: Path, foci: Mapping[str, Sequence[Focus]]) -> Iterator[Measured]:
    for slide_id in foci:
        file = folder / "slides" / slide_id / "patches.csv"
        if not file.is_file():
            continue
        table = pd.read_csv(file)
        record = json.loads((folder / "tiles" / f"{slide_id}.json").read_text(encoding="utf-8"))
        values = {name: table[name].to_numpy(np.float64) for name in MAPS if name in table}
        groups = table["group"].to_numpy(np.int64) if "group" in table else None
        yield {"slide_id": slide_id}, table[["x", "y"]].to_numpy(np.int32), record["patch_px_level0"], groups, values


def _of_runs(folder: Path, foci: Mapping[str, Sequence[Focus]]) -> Iterator[Measured]:
    runs = run_folders(folder)
    if not runs:
        raise InferenceError(f"{folder} holds no trained model and no predictions: give results/DATASET/EXPERIMENT")
    device = choose_device()
    for run in progress_bar(runs, desc="localising", unit="runs"):
        model, card = load_model(run)
        dataset = run.parent.parent
        results, encoder, grouping = dataset.parent, card["encoder"], card["experiment"]["grouping"]
        splits = pd.read_csv(dataset / "splits.csv", dtype=str)
        cohorts = splits["cohort"].unique()
        tables = {cohort: results / cohort / "features" / f"{encoder}.csv" for cohort in cohorts}
        groups = None
        if grouping:
            place = f"{encoder}/{grouping}.npz" if grouping.startswith("features-") else f"{grouping}.npz"
            groups = {cohort: results / cohort / "groups" / place for cohort in cohorts}
        make_repeatable(card["seed"], 1)
        model.to(device)
        test = load_bags(dataset / "splits.csv", card["fold"], "test", tables, groups, encoder, card["classes"])
        for item, bag in BagReader(device, budget=0).stream([item for item in test if item.slide_id in foci]):
            with torch.no_grad():
                output = model(bag)
            values = {}
            if output.attention is not None:
                values["attention"] = output.attention.double().cpu().numpy()
            values["contribution"] = patch_contributions(model, bag, output, item.label).values
            values["evidence"] = patch_evidence(model, bag, item.label)
            side = item.store.attributes.patch_px_level0
            assert side is not None
            row = {"slide_id": item.slide_id, "fold": card["fold"], "seed": card["seed"]}
            yield row, item.store.coords, side, None if item.groups is None else item.groups.numpy(), values


def _summary(measured: pd.DataFrame) -> str:
    lines = [f"{measured['slide_id'].nunique()} slides with foci, {len(measured)} maps; mean ± sd over the maps:"]
    for name in MAPS:
        if f"{name}_auroc" in measured:
            auroc, ap, top = (measured[f"{name}_{what}"].astype(float) for what in ("auroc", "ap", "top"))
            lines.append(
                f"  {name:12} AUROC {auroc.mean():.3f} ± {auroc.std():.3f}   average precision {ap.mean():.3f} ±"
                f" {ap.std():.3f}   highest patch in a focus: {top.mean():.0%}"
                + (f", of a group {measured[f'{name}_group_top'].mean():.0%}" if "group_chance" in measured else "")
            )
    if "group_chance" in measured:
        lines.append(f"  (a group's patch at random: {measured['group_chance'].mean():.0%})")
    return "\n".join(lines)
