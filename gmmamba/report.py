"""report: one page that shows what ran on a dataset and what came out, and the tables behind it.

Reads the slide tables, splits.csv, comparisons.csv and of every experiment metrics.csv, pooled.csv and, of each run,
history.csv, model.json, predictions.csv and attention.npz; thumbnails, stores and groups of the slides shown. Writes

report.html     self-contained: pictures are embedded, nothing is fetched, there is no script
table.csv       one row an experiment: `experiment, method, runs`, and of each metric <metric>_mean, _sd over runs and
                <metric>_pooled, _low, _high over all test slides, with the 95 % interval
accounting.csv  one row a cohort: `dataset, cohort, in_sheet, excluded, failed, not_tested, predicted`, where
                in_sheet = excluded + failed + not_tested + predicted; not_tested are ready slides that no test part
                holds (none for a k-fold)
report.json     which files the report was made of: what `view` shows
"""

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from gmmamba import __version__, charts, figures
from gmmamba.evaluation import Evaluation, probabilities_of
from gmmamba.project import where_to_look
from gmmamba.report_runs import (
    Run,
    check_complete,
    check_finished,
    of_runs,
    pooled_predictions,
    read_metrics,
    read_runs,
)
from gmmamba.report_slides import Drawer, attentive, choose_errors, choose_examples
from gmmamba.report_tables import (
    COUNTS,
    METRIC_NAMES,
    WORST_ROWS,
    comparison_rows,
    confusion,
    count_slides,
    describe_splits,
    format_scores,
    full_name,
    further_metrics,
    pooled_rows,
    read_pooled,
    run_rows,
    score_table,
    shown_metrics,
    wrong_calls,
)
from gmmamba.slide_tables import read_slide_tables
from slidestore.atomic import replace_when_whole
from slidestore.settings import from_dict

PACKAGES = ("numpy", "scipy", "scikit-learn", "pandas", "zarr", "matplotlib")


@dataclass(frozen=True)
class ReportSettings:
    """example_slides: shown of those called right; error_slides: of those called wrong. costs: what `python -m
    benchmarks.cost measure --csv` wrote, for the figure of cost."""

    title: str = "Whole-slide classification"
    example_slides: int = 3
    error_slides: int = 4
    costs: str | None = None


@dataclass(frozen=True)
class Outputs:
    """See the module."""

    report: Path
    table: Path
    accounting: Path
    manifest: Path


def report(
    dataset: str,
    experiments: Sequence[Mapping[str, Any]],
    folds: Sequence[int],
    seeds: Sequence[int],
    classes: list[str],
    encoder: Mapping[str, Any],
    sheets: Mapping[str, str],
    slide_tables: Mapping[str, Path],
    splits: Path,
    groups: Mapping[tuple[str, str], Path],
    results: Path,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    outputs: Outputs,
    evaluation: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write the four outputs; see the module.

    experiments: as training was given them, in the order of the table's rows. encoder: name, model, weights, ...
    sheets, slide_tables: cohort -> CSV. groups: (cohort, grouping) -> npz. results: the dataset's folder, which holds
    comparisons.csv and {experiment}/fold{fold}_seed{seed}/. config: what else the page shows as the resolved
    configuration, besides encoder and experiments; all of it JSON values. evaluation: the configuration's, by which
    metrics.csv was made (None: the defaults). notes: what was said of the sheets when the configuration was checked.

    Raises ValueError where predictions are missing for a slide of a test part.
    """
    chosen = from_dict(ReportSettings, settings, "report")
    slides = read_slide_tables(slide_tables)
    parts = pd.read_csv(splits, dtype=str, keep_default_na=False)
    names = [str(e["name"]) for e in experiments]
    runs = {name: read_runs(results / name, folds, seeds) for name in names}
    metrics = {name: read_metrics(results / name) for name in names}
    check_complete(runs, parts)

    counts = count_slides(dataset, slides, parts, folds)
    times_tested = (parts[[f"fold{fold}" for fold in folds]] == "test").sum(axis=1)
    scores = score_table(experiments, results)
    shown = shown_metrics(scores, len(classes))
    further, of_class = further_metrics(read_pooled(results / names[0], "slide"), shown, len(classes))
    wrong = wrong_calls(runs, metrics, classes)
    attending = attentive(experiments, runs)
    drawer = Drawer(attending, runs, metrics, classes, slides, groups)
    by = str((attending or experiments)[0]["name"])
    page = _template().render(
        title=chosen.title,
        dataset=dataset,
        classes=classes,
        encoder=encoder,
        patients=parts["patient_id"].nunique(),
        folds=folds,
        seeds=seeds,
        counts=counts.to_dict("records"),
        total={name: int(counts[name].sum()) for name in COUNTS},
        lost=slides[slides["status"] != "ready"].to_dict("records"),
        tested_again=int((times_tested > 1).sum()),
        notes=notes,
        split_rows=describe_splits(parts, folds, classes),
        metrics=shown,
        scores=format_scores(scores),
        intervals=charts.interval_figure(
            [(row["experiment"], row["auroc_pooled"], row["auroc_low"], row["auroc_high"])
             for row in scores.to_dict("records")],
            "AUROC of all test slides, with its 95 % interval", 0.5,
        ),
        further=[full_name(name) for name in further],
        further_rows=pooled_rows(names, results, "slide", further),
        of_classes=[full_name(name) for name in of_class],
        class_rows=pooled_rows(names, results, "slide", of_class),
        patient_rows=pooled_rows(names, results, "patient", list(shown)) if several_slides(parts) else [],
        comparisons=comparison_rows(pd.read_csv(results / "comparisons.csv")),
        by_threshold=len(classes) == 2 and any((of_runs(m)["threshold"] != 0.5).any() for m in metrics.values()),
        per_run=run_rows(experiments, results),
        curves=curve_rows(runs, metrics, classes),
        by=by,
        errors=[drawer.row(error) for error in choose_errors(runs[by], metrics[by], classes, chosen.error_slides)],
        wrong=wrong.head(WORST_ROWS).to_dict("records"),
        n_wrong=len(wrong),
        examples=[
            drawer.row(example)
            for example in choose_examples(runs[by], metrics[by], classes, chosen.example_slides if attending else 0)
        ],
        cost=cost_picture(Path(chosen.costs), scores, slides) if chosen.costs else None,
        training=[
            (name, charts.training_figure([r.history for r in rs], [r.card["best_epoch"] for r in rs],
                                          figures.colour_of(i)))
            for i, (name, rs) in enumerate(runs.items())
        ],
        kept={name: [run.card["best_epoch"] for run in rs] for name, rs in runs.items()},
        config=json.dumps({"encoder": encoder, **config, "experiments": experiments}, indent=2),
        versions={"python": platform.python_version(), "gmmamba": __version__} | {p: version(p) for p in PACKAGES},
        trained_on=sorted({f"{r.card['device']}, torch {r.card['torch_version']}" for rs in runs.values() for r in rs}),
    )  # fmt: skip
    manifest = {
        "dataset": dataset,
        "classes": classes,
        "experiments": {str(e["name"]): e["grouping"] for e in experiments},
        "folds": list(folds),
        "seeds": list(seeds),
        "evaluation": asdict(from_dict(Evaluation, evaluation or {}, "evaluation")),
        "sheets": dict(sheets),
        "slide_tables": {cohort: str(path) for cohort, path in slide_tables.items()},
        "groups": [[cohort, grouping, str(path)] for (cohort, grouping), path in groups.items()],
    }
    with replace_when_whole(outputs.table) as part:
        scores.to_csv(part, index=False)
    with replace_when_whole(outputs.accounting) as part:
        counts.to_csv(part, index=False)
    with replace_when_whole(outputs.manifest) as part:
        part.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with replace_when_whole(outputs.report) as part:
        part.write_text(page, encoding="utf-8")


def several_slides(parts: pd.DataFrame) -> bool:
    """Whether a patient has several slides: else patients are slides, and a table of them would say nothing new."""
    return bool(parts["patient_id"].duplicated().any())


def curve_rows(
    runs: Mapping[str, Sequence[Run]], metrics: Mapping[str, pd.DataFrame], classes: list[str]
) -> list[dict[str, Any]]:
    """Of each experiment `name`, the charts `roc`, `precision`, `calibration` and the table `confusion`."""
    tests = {name: [probabilities_of(run.test, classes) for run in rs] for name, rs in runs.items()}
    roc = {name: np.stack([charts.roc_on_grid(*test) for test in of]) for name, of in tests.items()}
    precision = {name: np.stack([charts.precision_on_grid(*test) for test in of]) for name, of in tests.items()}
    two = len(classes) == 2
    rows = []
    for i, name in enumerate(runs):
        colour = figures.colour_of(i)
        others = [other for other in runs if other != name]
        true, probabilities = pooled_predictions(runs[name], classes)
        share = float(np.mean(true == 1)) if two else 1 / len(classes)
        bins = charts.calibration(true, probabilities)
        what = f"predicted probability of {classes[1]}" if two else "probability of the called class"
        rows.append(
            {
                "name": name,
                "roc": charts.roc_figure(roc[name], [roc[other].mean(axis=0) for other in others], colour),
                "precision": charts.precision_recall_figure(
                    precision[name], [precision[other].mean(axis=0) for other in others], share, colour
                ),
                "calibration": charts.calibration_figure(bins, what, colour),
                "confusion": confusion(runs[name], metrics[name], classes),
            }
        )
    return rows


def cost_picture(costs: Path, scores: pd.DataFrame, slides: pd.DataFrame) -> dict[str, Any]:
    """The chart of cost against AUROC, at the measured size of slide that is nearest to this dataset's median.

    Raises ValueError where `costs` and the experiments have no method in common.
    """
    measured = pd.read_csv(costs).dropna()
    patches = slides.loc[slides["status"] == "ready", "n_patches"].astype(int).median()
    sizes = measured["N"].unique()
    size = int(sizes[np.abs(np.log(sizes / patches)).argmin()])
    by_model = measured[measured["N"] == size].set_index("model")
    rows, reached = [], {}
    for row in scores.to_dict("records"):
        key = row["experiment"] if row["experiment"] in by_model.index else row["method"]
        if key in by_model.index:
            rows.append({"label": row["experiment"], **by_model.loc[key, ["seconds", "flops"]]})
            reached[row["experiment"]] = row["auroc_mean"]
    if not rows:
        methods = ", ".join(measured["model"].unique())
        raise ValueError(
            f"report.costs: {costs} has the methods {methods} and none of the experiments': "
            "measure them with `python -m benchmarks.cost measure`, or leave report.costs out"
        )
    figure = charts.cost_figure(pd.DataFrame(rows), reached, "AUROC, mean over runs", size)
    return {"uri": figures.svg(figure), "size": size}


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2")


def summary(folder: Path) -> None:
    """Print the result table and the accounting of a dataset's folder, and where its report is.

    Raises FileNotFoundError unless that is finished.
    """
    check_finished(folder)
    scores = pd.read_csv(folder / "table.csv")
    counts = pd.read_csv(folder / "accounting.csv")
    shown = [name for name in METRIC_NAMES if not scores[f"{name}_mean"].isna().all()]
    table = pd.DataFrame(
        {METRIC_NAMES[name]: [row["cells"][name]["text"] for row in format_scores(scores)] for name in shown},
        index=list(scores["experiment"]),
    )
    print(f"Test slides, mean ± sd over {scores['runs'].max()} runs:\n{table.to_string()}\n")
    print(f"Slides:\n{counts.to_string(index=False)}\n")
    cohorts = counts.loc[counts["dataset"] == folder.name, "cohort"]
    sheets = [page for cohort in cohorts if (page := folder.parent / cohort / "contact_sheet.html").is_file()]
    command = sys.argv[0] if Path(sys.argv[0]).name == "gmmamba" else "gmmamba"
    print("\n".join(where_to_look(sheets, [folder / "report.html"], command)))
