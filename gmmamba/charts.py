"""The charts of the report, as SVG by matplotlib: a page with them needs no script, prints sharply and is the same each
time. Each returns a data URI.

S test slides, C classes, R runs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from sklearn.metrics import precision_recall_curve, roc_curve

from gmmamba.figures import OKABE_ITO, STYLE, svg
from gmmamba.intervals import wilson

GRID = np.linspace(0, 1, 201)  # false positive rates, or recalls, at which the curves of runs are averaged
BINS = 10  # of predicted probability
GREY = "#bbbbbb"
NORMAL_95 = 1.959964  # quantile of the normal distribution


def roc_on_grid(true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The true positive rates at GRID (201,). true (S,) class indices, probabilities (S, C).

    Two classes: of the second. More: the mean of one class versus the rest.
    """
    rates = []
    for positive, scores in one_versus_rest(true, probabilities):
        false_positive, true_positive, _ = roc_curve(positive, scores)
        rates.append(np.interp(GRID, false_positive, true_positive))
    return np.mean(rates, axis=0)


def precision_on_grid(true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The precisions at the recalls of GRID (201,), in steps as average precision counts; else as `roc_on_grid`."""
    precisions = []
    for positive, scores in one_versus_rest(true, probabilities):
        precision, recall, _ = precision_recall_curve(positive, scores)  # recall falls from 1 to 0
        reached = np.searchsorted(-recall, -GRID, side="right") - 1  # the last point whose recall is at least GRID
        precisions.append(precision[reached])
    return np.mean(precisions, axis=0)


def one_versus_rest(true: np.ndarray, probabilities: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Whether a slide is of the class (S,), and its probability (S,): of the second of two classes, else of each."""
    n_classes = probabilities.shape[1]
    return [(true == c, probabilities[:, c]) for c in ([1] if n_classes == 2 else range(n_classes))]


def roc_figure(runs: np.ndarray, others: Sequence[np.ndarray], colour: str) -> str:
    """The ROC of one experiment: its runs (R, 201) pale, their mean bold, the means of `others` (201,) grey."""
    with mpl.rc_context(STYLE):
        figure, axes = _square()
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
        _draw(axes, [0, *GRID], np.insert(runs, 0, 0, axis=1), [np.insert(other, 0, 0) for other in others], colour)
        axes.set(xlabel="false positive rate (1 − specificity)", ylabel="true positive rate (sensitivity)")
        return svg(figure)


def precision_recall_figure(runs: np.ndarray, others: Sequence[np.ndarray], share: float, colour: str) -> str:
    """The same of precision (R, 201) against recall; dotted: `share`, the precision of guessing."""
    with mpl.rc_context(STYLE):
        figure, axes = _square()
        axes.axhline(share, color="#999999", linewidth=0.8, linestyle=":")
        _draw(axes, GRID, runs, others, colour)
        axes.set(xlabel="recall (sensitivity)", ylabel="precision")
        return svg(figure)


def _square() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.1, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return figure, axes


def _draw(axes: Axes, x: Any, runs: np.ndarray, others: Sequence[np.ndarray], colour: str) -> None:
    for other in others:
        axes.plot(x, other, color=GREY, linewidth=1)
    for run in runs:
        axes.plot(x, run, color=colour, alpha=0.3, linewidth=1)
    axes.plot(x, runs.mean(axis=0), color=colour, linewidth=2.4)


def calibration(true: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """What was predicted and what came true, a row a bin of probability that holds slides: `predicted` (mean), `n`,
    `observed` (share), `low, high` (its 95 % interval, Wilson's).

    Two classes: the probability of the second. More: that of the called class, and whether the call is right.
    """
    two = probabilities.shape[1] == 2
    predicted = probabilities[:, 1] if two else probabilities.max(axis=1)
    came_true = true == 1 if two else true == probabilities.argmax(axis=1)
    bins = np.minimum((predicted * BINS).astype(int), BINS - 1)
    table = pd.DataFrame({"bin": bins, "predicted": predicted, "observed": came_true})
    rows = table.groupby("bin").agg(
        predicted=("predicted", "mean"), observed=("observed", "mean"), n=("observed", "size")
    )
    intervals = [wilson(share, n, NORMAL_95) for share, n in zip(rows["observed"], rows["n"], strict=True)]
    return rows.assign(low=[low for low, _ in intervals], high=[high for _, high in intervals]).reset_index()


def calibration_figure(bins: pd.DataFrame, what: str, colour: str) -> str:
    """Predicted against observed, with intervals, and below how many slides there are; `what` is predicted."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.1, 3.1), layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
        bars = np.abs(bins[["low", "high"]].to_numpy().T - bins["observed"].to_numpy())
        axes.errorbar(bins["predicted"], bins["observed"], bars, fmt="o", color=colour, markersize=5, elinewidth=1,
                      capsize=2)  # fmt: skip
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="observed share")
        below.bar((bins["bin"] + 0.5) / BINS, bins["n"], 0.9 / BINS, color="#999999")
        below.set(xlabel=what, ylabel="slides")
        return svg(figure)


def interval_figure(rows: Sequence[tuple[str, float, float, float]], what: str, guessing: float | None) -> str:
    """A dot and its interval a row (name, value, low, high), the first on top."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 0.75 + 0.28 * len(rows)), layout="constrained")
        axes = figure.subplots()
        if guessing is not None:
            axes.axvline(guessing, color="#999999", linewidth=0.8, linestyle=":")
        for place, (_, value, low, high) in enumerate(rows):
            axes.plot([low, high], [place, place], color=OKABE_ITO[0], linewidth=2, solid_capstyle="butt")
            axes.plot([value], [place], "o", color=OKABE_ITO[0], markersize=6)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set(xlabel=what, ylim=(len(rows) - 0.5, -0.5))
        return svg(figure)


def training_figure(histories: Sequence[pd.DataFrame], kept: Sequence[int], colour: str) -> str:
    """Losses and validation AUROC over the epochs, a line a run, a dot at the epoch that each run kept."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 2.5), layout="constrained")
        loss, auroc = figure.subplots(1, 2)
        for number, (history, epoch) in enumerate(zip(histories, kept, strict=True)):
            at = history[history["epoch"] == epoch]
            train, validation = ("training", "validation") if number == 0 else (None, None)
            loss.plot(history["epoch"], history["train_loss"], color="#777777", linewidth=1, alpha=0.7, label=train)
            loss.plot(
                history["epoch"], history["val_loss"], color=colour, linewidth=1.2, alpha=0.7, linestyle="--",
                label=validation,
            )  # fmt: skip
            auroc.plot(history["epoch"], history["val_auroc"], color=colour, linewidth=1.2, alpha=0.5)
            auroc.plot(at["epoch"], at["val_auroc"], "o", color=colour, markersize=5)
        loss.set(xlabel="epoch", title="loss", ylim=(0, None))
        loss.legend(frameon=False, fontsize=8)
        auroc.set(xlabel="epoch", title="validation AUROC (dot: kept)", ylim=(-0.03, 1.03))
        return svg(figure)


def cost_figure(costs: pd.DataFrame, reached: Mapping[str, float], what: str, size: int) -> Figure:
    """Seconds a slide of `size` patches against what a method reaches; the area of a bubble are its FLOPs.

    costs: a row a method, `label, seconds, flops`; reached: label -> value of the metric `what`.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        values = [reached[label] for label in costs["label"]]
        area = np.maximum(1500 * costs["flops"] / costs["flops"].max(), 8)
        colours = [OKABE_ITO[1] if name.lower().startswith("gmmamba") else OKABE_ITO[0] for name in costs["label"]]
        axes.set(xscale="log", xlabel=f"seconds a slide of {size:,} patches; area: FLOPs", ylabel=what)
        axes.margins(0.1)
        axes.scatter(costs["seconds"], values, area, colours, alpha=0.5, clip_on=False)
        figure.draw_without_rendering()  # now it is known where the bubbles are
        label_bubbles(axes, zip(costs["label"], costs["seconds"], values, np.sqrt(area / np.pi), strict=True))
        return figure


def label_bubbles(axes: Axes, bubbles: Iterable[tuple[str, float, float, float]]) -> None:
    """Write each label on its bubble or, where others are written, beside it; the axes are laid out.

    bubbles: label, x, y and radius in points of each.
    """
    sides = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
    taken: list[Bbox] = []
    for label, x, y, radius in bubbles:
        places = [
            axes.annotate(
                label,
                (x, y),
                ((radius + 2) * right, (radius + 2) * up),
                textcoords="offset points",
                fontsize=7,
                ha={-1: "right", 0: "center", 1: "left"}[right],
                va={-1: "top", 0: "center", 1: "bottom"}[up],
                in_layout=False,
            )
            for right, up in sides
        ]
        boxes = [place.get_window_extent() for place in places]
        best = boxes.index(min(boxes, key=lambda box: sum(map(box.overlaps, taken))))
        taken.append(boxes[best])
        for place in places[:best] + places[best + 1 :]:
            place.remove()
