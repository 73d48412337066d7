"""Everything that the report reads, made by the stages before it: three methods on two cohorts, over two folds."""

from pathlib import Path
from typing import Any

from gmmamba.comparison import compare
from gmmamba.evaluation import Evaluation, evaluate
from gmmamba.prediction import predict
from gmmamba.splits import SplitSettings, split_dataset
from gmmamba.training import train
from tests.gmmamba.synthetic import CLASSES, ENCODER, experiment, make_dataset

FOLDS = [0, 1]
METHODS = ["gmmamba", "abmil", "mean"]


def make_finished(folder: Path) -> dict[str, Any]:
    """The arguments of `report`, but for its outputs; all that it reads is in `folder`."""
    slide_tables, location = make_dataset(folder, patients=9, cohort="north")
    more_tables, more_location = make_dataset(folder, patients=4, cohort="south", seed=1)
    slide_tables |= more_tables
    location |= more_location
    splits, results = folder / "splits.csv", folder / "results"
    split_dataset(slide_tables, CLASSES, SplitSettings(folds=2), splits)
    experiments = [experiment(method, epochs=2) for method in METHODS]
    predictions = {}
    for e in experiments:
        groups = location if e["grouping"] else None
        files = []
        for fold in FOLDS:
            run = results / str(e["name"]) / f"fold{fold}_seed0"
            train(e, fold, 0, splits, slide_tables, groups, run, threads=1)
            files.append(run / "predictions.csv")
            predict(run, fold, 0, splits, slide_tables, groups, files[-1], run / "attention.npz")
        of_experiment = results / str(e["name"])
        evaluate(files, CLASSES, Evaluation(), of_experiment / "metrics.csv", of_experiment / "pooled.csv")
        predictions[str(e["name"])] = files
    compare(predictions, Evaluation(), results / "comparisons.csv")
    return {
        "dataset": "two-hospitals",
        "experiments": experiments,
        "folds": FOLDS,
        "seeds": [0],
        "classes": CLASSES,
        "encoder": {"name": ENCODER, "model": "resnet18", "weights": "random", "seed": 0},
        "sheets": {cohort: f"{cohort}/slides.csv" for cohort in slide_tables},
        "slide_tables": slide_tables,
        "splits": splits,
        "groups": {(cohort, "location-4"): path for cohort, path in location.items()},
        "results": results,
        "settings": {"title": "Nodes & <nodules>", "example_slides": 3},
        "config": {"training": {"epochs": 2}},
    }
