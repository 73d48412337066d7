"""A finished dataset with slides that can be looked at, and all that lies over them.

Nothing is trained: `gmmamba` and `mean` predict and attend as written here, so that tests know every number.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from slidestore import write_store
from slidestore.groups import write_groups
from tests.gmmamba.synthetic import CLASSES, ENCODER, GRID_H, GRID_W, PATCH_PX, attributes_of, make_slide
from tests.slides import tissue, write_aperio

WIDTH, HEIGHT = GRID_W * PATCH_PX, GRID_H * PATCH_PX
RIGHT = {  # slide -> P(true class) that gmmamba and mean give it
    "s0": (0.9, 0.5), "s1": (0.2, 0.6), "s2": (0.7, 0.4), "s3": (0.05, 0.5), "gone": (0.6, 0.5), "imported": (0.8, 0.5),
}  # fmt: skip
GROUPING = "location-4"


def label_of(slide_id: str) -> str:
    return CLASSES[list(RIGHT).index(slide_id) % 2]


def make_viewed(project: Path) -> Path:
    """Write project/results/d and the cohort's files; returns results/d. Slides of RIGHT are tested, s0 … s3 in folds 0
    and 1; `gone` has no file, `imported` no path in the sheet, `broken` failed."""
    rng = np.random.default_rng(0)
    results, tiles, cohort = project / "results/d", project / "results/c/tiles", project / "cohort"
    for folder in (tiles, cohort):
        folder.mkdir(parents=True)
    rows, grouped, attention, sheet = [], {}, {}, []
    for number, slide_id in enumerate(RIGHT):
        coords, features, labels = make_slide(rng, label_of(slide_id) == CLASSES[1])
        write_store(tiles / f"{slide_id}.zarr.zip", coords, features, attributes_of(slide_id, "c", "ab" * 32))
        grouped[slide_id] = (coords, labels)
        values = rng.random(len(coords)).astype(np.float32)
        values[0], values[1] = 0, 2  # masked away; the most
        attention[slide_id] = values / values.sum()
        if slide_id not in ("gone", "imported"):
            write_aperio(cohort / f"{slide_id}.svs", tissue(WIDTH, HEIGHT, seed=number, dark=bool(number % 2)),
                         downsamples=(1, 4))  # fmt: skip
        path = "" if slide_id == "imported" else f"{slide_id}.svs"
        sheet.append((slide_id, f"P{number}", label_of(slide_id), path))
        rows.append((slide_id, f"P{number}", label_of(slide_id), "ready", "", len(coords), f"{slide_id}.zarr.zip"))
        ring = [[0, 0], [WIDTH, 0], [WIDTH, HEIGHT], [0, HEIGHT], [0, 0]]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        (tiles / f"{slide_id}.geojson").write_text(json.dumps({"features": [{"geometry": geometry}]}))
    sheet.append(("broken", "P9", CLASSES[0], "broken.svs"))
    rows.append(("broken", "P9", CLASSES[0], "failed", "tile: the file ends early", 0, ""))
    (cohort / "broken.svs").write_bytes((cohort / "s0.svs").read_bytes()[:30000])

    columns = ["slide_id", "patient_id", "label", "status", "reason", "n_patches", "store"]
    table = pd.DataFrame(rows, columns=columns)
    table["store"] = "results/c/tiles/" + table["store"]  # as Snakemake writes it: relative to where it runs
    table["thumbnail"] = "results/c/tiles/" + table["slide_id"] + ".thumbnail.jpg"
    (project / "results/c/features").mkdir()
    table.to_csv(project / f"results/c/features/{ENCODER}.csv", index=False)
    for slide_id in RIGHT:
        Image.new("RGB", (GRID_W * 40, GRID_H * 40), "#c878aa").save(tiles / f"{slide_id}.thumbnail.jpg")
    with (cohort / "slides.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("slide_id", "patient_id", "label", "path"), *sheet])
    (cohort / "foci.csv").write_text(f"slide_id,x,y,tile_px,class\ns1,448,224,{PATCH_PX},tumour\ns3,0,0,224,tumour\n")
    write_groups(project / f"results/c/groups/{GROUPING}.npz", grouped)

    for at, name in enumerate(("gmmamba", "mean")):
        for fold in (0, 1):
            run = results / name / f"fold{fold}_seed0"
            run.mkdir(parents=True)
            ids = [slide_id for slide_id in RIGHT if list(RIGHT).index(slide_id) // 2 % 2 == fold]
            write_predictions(run / "predictions.csv", ids, fold, at)
            even = {slide_id: np.full_like(values, 1 / len(values)) for slide_id, values in attention.items()}
            maps = {slide_id: (even if name == "mean" else attention)[slide_id] for slide_id in ids}
            with (run / "attention.npz").open("wb") as file:
                np.savez(file, **maps)
        write_thresholds(results / name, 0.5)
    manifest = {
        "dataset": "d", "classes": CLASSES, "experiments": {"gmmamba": GROUPING, "mean": None}, "folds": [0, 1],
        "seeds": [0], "sheets": {"c": "cohort/slides.csv"}, "slide_tables": {"c": f"results/c/features/{ENCODER}.csv"},
        "groups": [["c", GROUPING, f"results/c/groups/{GROUPING}.npz"]],
    }  # fmt: skip
    (results / "report.json").write_text(json.dumps(manifest))
    return results


def write_thresholds(experiment: Path, threshold: float) -> None:
    """Of metrics.csv what is read: both folds have this threshold."""
    rows = [("0", "0", threshold), ("1", "0", threshold), ("mean", "", threshold), ("sd", "", 0)]
    pd.DataFrame(rows, columns=["fold", "seed", "threshold"]).to_csv(experiment / "metrics.csv", index=False)


def write_predictions(path: Path, ids: list[str], fold: int, at: int) -> None:
    rows = []
    for slide_id in ids:
        true, right = label_of(slide_id), RIGHT[slide_id][at]
        positive = right if true == CLASSES[1] else 1 - right
        rows.append((slide_id, f"P{list(RIGHT).index(slide_id)}", "c", fold, 0, "test", true,
                     CLASSES[int(positive > 0.5)], 1 - positive, positive))  # fmt: skip
    columns = ["slide_id", "patient_id", "cohort", "fold", "seed", "part", "true", "predicted"]
    pd.DataFrame(rows, columns=columns + [f"prob_{name}" for name in CLASSES]).to_csv(path, index=False)
