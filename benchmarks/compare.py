"""Experiments of one dataset against a reference among them, on the same test slides.

    python -m benchmarks.compare results/tiles1 abmil max gmmamba

Prints a Markdown table, a row for each experiment; the first is the reference. The AUROC over folds is the mean ± sd of
the test folds of all seeds. The others pool the test slides of all folds, as each slide is tested once a seed, and
average over seeds; the differences come with 95 % intervals of 2000 bootstrap samples of patients, the same for both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.measure import markdown_table
from gmmamba.comparison import bootstrap_samples, check_same_slides, interval, pooled, read_test, values
from gmmamba.evaluation import probabilities_of
from gmmamba.metrics import classification_metrics


def compare(folder: Path, experiments: list[str]) -> str:
    tables = {}
    for name in experiments:
        files = sorted((folder / name).glob("fold*_seed*/predictions.csv"))
        if not files:
            raise SystemExit(f"{folder / name} has no fold*_seed*/predictions.csv: run the experiment first")
        tables[name] = read_test(files)
    seeds = set.intersection(*(set(table["seed"]) for table in tables.values()))
    tables = {name: table[table["seed"].isin(seeds)].reset_index(drop=True) for name, table in tables.items()}
    check_same_slides(tables)
    reference = tables[experiments[0]]
    classes = [c.removeprefix("prob_") for c in reference.columns if c.startswith("prob_")]
    samples = bootstrap_samples(reference)
    pools = {name: pooled(table, classes) for name, table in tables.items()}
    sampled = {name: values(pool, samples) for name, pool in pools.items()}
    whole = {name: values(pool, np.ones_like(samples[:1]))[0] for name, pool in pools.items()}

    rows = []
    for name, table in tables.items():
        runs = [run for _, run in table.groupby(["fold", "seed"])]
        folds = [classification_metrics(*probabilities_of(run, classes))["auroc"] for run in runs]
        auroc, accuracy, loss = whole[name]
        row = [name, str(len(runs)), f"{np.mean(folds):.3f} ± {np.std(folds, ddof=1):.3f}"]
        row += [f"{auroc:.3f}", f"{accuracy:.3f}", f"{loss:.3f}"]
        for metric in (0, 2):
            difference = whole[name][metric] - whole[experiments[0]][metric]
            low, high = interval((sampled[name] - sampled[experiments[0]])[:, metric])
            row.append("" if name == experiments[0] else f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]")
        rows.append(row)
    header = ["experiment", "runs", "AUROC over folds", "AUROC", "accuracy", "log loss"]
    return markdown_table([*header, "difference in AUROC", "difference in log loss"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="results/{dataset}")
    parser.add_argument("experiments", nargs="+", help="the first is the reference")
    options = parser.parse_args()
    print(compare(options.folder, options.experiments))


if __name__ == "__main__":
    main()
