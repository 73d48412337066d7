"""table: one of the paper's tables (config/tables.yaml) of one dataset, in the poster's layout.

Reads metrics.csv and each run's predictions.csv of the rows' experiments. Writes

CSV       one row an experiment: `experiment, label`, a column a part (1 or 0), `runs`, <metric>_mean and <metric>_sd of
          each of gmmamba.metrics, `compared_with`, `auroc_difference, auroc_low, auroc_high` and, where rows gain over
          another, <metric>_gain
Markdown, mean ± sd over runs, the best of a column bold, the second underlined (where rows gain over another: the gain
LaTeX     in points of percent instead); ΔAUC

ΔAUC is the AUROC of the pooled test slides minus that of the reference (or of the row gained over), with the 95 %
interval of a bootstrap over patients, the same samples for both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gmmamba.comparison import compare_pairs, pooled_runs, read_runs
from gmmamba.evaluation import Evaluation
from gmmamba.metrics import METRICS
from gmmamba.table_rows import Table, experiment_name, table_of
from slidestore.atomic import replace_when_whole

NAMES = {"accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy", "auroc": "AUC", "auprc": "AUPRC"}
EMPHASIS = {
    "markdown": {"": "{}", "best": "**{}**", "second": "<u>{}</u>"},
    "latex": {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"},
}
Cell = tuple[str, str]  # text, and one of the keys of EMPHASIS
LATEX = {
    "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "×": r"$\times$", "±": r"$\pm$", "✓": r"$\checkmark$",
    "✗": r"$\times$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "Δ": r"$\Delta$",
}  # fmt: skip


def write_table(
    table: Mapping[str, Any],
    protocol: str,
    dataset: str,
    classes: list[str],
    folds: Sequence[int],
    seeds: Sequence[int],
    results: Path,
    csv: Path,
    markdown: Path,
    latex: Path,
) -> None:
    """Write the three forms of `table`, a mapping as in config/tables.yaml.

    results: the dataset's folder, which holds {row}.{protocol}/fold{fold}_seed{seed}/. Raises ValueError where the rows
    were not tested on the same slides.
    """
    drawn = table_of(table)
    numbers = table_numbers(drawn, protocol, classes, folds, seeds, results)
    metrics = [("f1_positive" if len(classes) == 2 else "macro_f1") if m == "f1" else m for m in drawn.metrics]
    header, cells = layout(drawn, numbers, metrics)
    other = drawn.rows[drawn.reference].label if drawn.reference else "its method without CSS"
    caption = (
        f"{drawn.title}, {dataset}: mean ± sd over {numbers['runs'].max()} folds and seeds, {protocol} protocol. "
        f"ΔAUC: pooled test slides, against {other}, with its 95 % interval."
    )
    with replace_when_whole(csv) as part:
        numbers.to_csv(part, index=False)
    with replace_when_whole(markdown) as part:
        part.write_text(as_markdown(caption, header, cells), encoding="utf-8")
    with replace_when_whole(latex) as part:
        part.write_text(as_latex(caption, header, cells), encoding="utf-8")


def table_numbers(
    table: Table, protocol: str, classes: list[str], folds: Sequence[int], seeds: Sequence[int], results: Path
) -> pd.DataFrame:
    """The CSV: see the module."""
    folders = {row: results / experiment_name(row, protocol) for row in table.rows}
    runs = read_runs(
        {
            row: [of / f"fold{f}_seed{s}" / "predictions.csv" for f, s in product(folds, seeds)]
            for row, of in folders.items()
        }
    )
    others = {row: what.against or table.reference for row, what in table.rows.items()}
    pairs = [(row, other) for row, other in others.items() if other is not None and other != row]
    compared = compare_pairs(pooled_runs(runs, classes, Evaluation(), "slide"), classes, pairs)
    compared = compared[(compared["metric"] == "auroc") & (compared["test"] == "bootstrap")].set_index("first")

    rows: list[dict[str, Any]] = []
    for row, what in table.rows.items():
        metrics = pd.read_csv(folders[row] / "metrics.csv", dtype={"fold": str, "seed": str}).set_index("fold")
        numbers: dict[str, Any] = {"experiment": folders[row].name, "label": what.label}
        numbers |= {part: int(part in what.parts) for part in table.parts}
        numbers["runs"] = len(metrics) - 2  # the last are mean and sd
        for name in METRICS:
            numbers |= {f"{name}_mean": metrics.at["mean", name], f"{name}_sd": metrics.at["sd", name]}
        numbers["compared_with"] = ""
        if row in compared.index:
            numbers["compared_with"] = folders[others[row] or ""].name
            numbers |= {f"auroc_{name}": compared.at[row, name] for name in ("difference", "low", "high")}
        rows.append(numbers)
    frame = pd.DataFrame(rows)
    if any(what.against for what in table.rows.values()):
        by_row = frame.set_index(pd.Index(table.rows))
        for name in METRICS:
            mean = by_row[f"{name}_mean"]
            gains = [mean[row] - mean[w.against] if w.against else np.nan for row, w in table.rows.items()]
            frame[f"{name}_gain"] = gains
    return frame


def layout(table: Table, numbers: pd.DataFrame, metrics: Sequence[str]) -> tuple[list[str], list[list[Cell]]]:
    """Header and cells, in the poster's columns."""
    names = ["F1" if "f1" in metric else NAMES[metric] for metric in metrics]
    header = [table.heading, *table.parts, *names, "ΔAUC [95 %]"]
    ranks = {metric: ranking(numbers[f"{metric}_mean"]) for metric in metrics}
    rows: list[list[Cell]] = []
    for i, row in enumerate(numbers.to_dict("records")):
        cells: list[Cell] = [(row["label"], ""), *(("✓" if row[part] else "✗", "") for part in table.parts)]
        for metric in metrics:
            mean, sd, gain = (row.get(f"{metric}_{of}", np.nan) for of in ("mean", "sd", "gain"))
            text = f"{mean:.3f}" if np.isnan(sd) else f"{mean:.3f} ± {sd:.3f}"
            if not np.isnan(gain):
                text += f" ({'↑' if gain >= 0 else '↓'} {100 * abs(gain):.1f}%)"
            cells.append((text, "" if f"{metric}_gain" in numbers else ranks[metric][i]))
        difference = f"{row['auroc_difference']:+.3f} [{row['auroc_low']:+.3f}, {row['auroc_high']:+.3f}]"
        rows.append([*cells, (difference if row["compared_with"] else "", "")])
    return header, rows


def ranking(means: pd.Series) -> list[str]:
    """best, second or nothing for each, as they are shown: to three digits."""
    shown = means.round(3)
    order = sorted(set(shown.dropna()), reverse=True)
    places = dict(zip(order, ("best", "second"), strict=False))
    return [places.get(value, "") for value in shown]


def as_markdown(caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = [list(header), ["---"] * len(header)]
    lines += [[EMPHASIS["markdown"][emphasis].format(text) if text else "" for text, emphasis in row] for row in rows]
    return caption + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_latex(caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table for a document with the packages booktabs and amssymb."""
    lines = [[escape(name) for name in header]]
    lines += [[EMPHASIS["latex"][emphasis].format(escape(text)) for text, emphasis in row] for row in rows]
    first, *body = [" & ".join(line) + r" \\" for line in lines]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape(caption)}}}",
            rf"\begin{{tabular}}{{l{'c' * (len(header) - 1)}}}",
            r"\toprule",
            first,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def escape(text: str) -> str:
    """For LaTeX; what stands between dollars is formula already."""
    formulas_and_text = re.split(r"(\$[^$]*\$)", text)
    return "".join(
        part if part.startswith("$") else "".join(LATEX.get(letter, letter) for letter in part)
        for part in formulas_and_text
    )
