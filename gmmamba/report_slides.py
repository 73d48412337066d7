"""The slides that the report shows: examples of what went right and the worst errors, with groups and attention."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gmmamba import figures
from gmmamba.report_runs import Run, called
from slidestore import open_store
from slidestore.groups import read_groups


@dataclass(frozen=True)
class Example:
    """A test slide to be shown: where it comes from and why it was chosen."""

    slide_id: str
    fold: int
    seed: int
    why: str


def choose_examples(runs: Sequence[Run], metrics: pd.DataFrame, classes: list[str], wanted: int) -> list[Example]:
    """Test slides worth seeing that one experiment calls right, the same ones every time.

    In turn: the most confident of each class (the positive one first), then the second of each, until there are
    `wanted` different ones. Each slide counts in its first run only.
    """
    table = first_runs(runs, metrics, classes)
    correct = table[table["true"] == table["called"]]
    correct = correct.sort_values(["right", "slide_id"], ascending=[False, True])
    queues = [correct[correct["true"] == name] for name in classes[::-1]]
    found = []
    for turn in range(len(table)):
        for name, queue in zip(classes[::-1], queues, strict=True):
            if turn < len(queue):
                row = queue.iloc[turn]
                found.append(Example(row["slide_id"], row["fold"], row["seed"], f"confident and right: {name}"))
    return found[:wanted]


def choose_errors(runs: Sequence[Run], metrics: pd.DataFrame, classes: list[str], wanted: int) -> list[Example]:
    """The `wanted` test slides to whose true class one experiment gives the lowest probability, of those that it calls
    wrong. Each slide counts in its first run only."""
    table = first_runs(runs, metrics, classes)
    wrong = table[table["true"] != table["called"]].sort_values(["right", "slide_id"])
    return [
        Example(row["slide_id"], row["fold"], row["seed"], f"called {row['called']}")
        for row in wrong.head(wanted).to_dict("records")
    ]


def first_runs(runs: Sequence[Run], metrics: pd.DataFrame, classes: list[str]) -> pd.DataFrame:
    """The test predictions of each slide in its first run; `called`, its class by the run's threshold (metrics.csv);
    and `right`, the probability of its true class."""
    table = pd.concat([run.test.assign(fold=run.fold, seed=run.seed) for run in runs], ignore_index=True)
    table["called"] = [classes[c] for c in called(runs, metrics, classes)]
    table = table.drop_duplicates("slide_id").reset_index(drop=True)
    columns = table["true"].map(classes.index).to_numpy()
    probabilities = table[[f"prob_{name}" for name in classes]].to_numpy()
    return table.assign(right=probabilities[np.arange(len(table)), columns])


class Drawer:
    """Draws slides for the report: the slide, each grouping, each experiment's attention.

    experiments: those whose attention says something, in order; metrics: metrics.csv of each; groups: (cohort,
    grouping) -> npz.
    """

    def __init__(
        self,
        experiments: Sequence[Mapping[str, Any]],
        runs: Mapping[str, Sequence[Run]],
        metrics: Mapping[str, pd.DataFrame],
        classes: list[str],
        slides: pd.DataFrame,
        groups: Mapping[tuple[str, str], Path],
    ) -> None:
        self.experiments, self.runs, self.metrics, self.groups = experiments, runs, metrics, groups
        self.classes = classes
        self.slides = slides[slides["status"] == "ready"].set_index("slide_id")
        self.shown = {label: classes[1] if len(classes) == 2 else label for label in classes}  # whose probability
        self.read = cache(read_groups)  # a file has the groups of all slides of its cohort

    def row(self, example: Example) -> dict[str, Any]:
        """What the page shows of a slide."""
        name = example.slide_id
        slide: dict[Any, str] = self.slides.loc[name].to_dict()
        store = open_store(Path(slide["store"]))
        attributes = store.attributes
        assert attributes.patch_px_level0 is not None, "a ready slide has patches"
        assert attributes.level0_width is not None, "a ready slide has a size"
        drawn = figures.SlidePictures(
            Path(slide["thumbnail"]), store.coords, attributes.patch_px_level0, attributes.level0_width
        )
        pictures = [
            {"uri": figures.jpeg(drawn.plain), "caption": "slide", "note": slide["label"], "alt": f"Slide {name}"}
        ]
        for grouping in dict.fromkeys(e["grouping"] for e in self.experiments if e["grouping"]):
            _, labels = self.read(self.groups[slide["cohort"], grouping])[name]
            note = f"{len(np.unique(labels))}, {grouping}"
            alt = f"The groups of patches of slide {name}"
            pictures.append({"uri": figures.jpeg(drawn.groups(labels)), "caption": "groups", "note": note, "alt": alt})
        pictures += [self.attention(example, drawn, e["name"], slide["label"]) for e in self.experiments]
        return {
            "slide_id": name,
            "label": slide["label"],
            "why": example.why,
            "fold": example.fold,
            "n_patches": len(store.coords),
            "pictures": pictures,
        }

    def attention(self, example: Example, drawn: figures.SlidePictures, experiment: str, label: str) -> dict[str, str]:
        """The heat map of the very run whose probability stands beneath it."""
        run = next(r for r in self.runs[experiment] if (r.fold, r.seed) == (example.fold, example.seed))
        with np.load(run.folder / "attention.npz") as maps:
            attention = maps[example.slide_id]
        predicted = run.test[run.test["slide_id"] == example.slide_id]
        call = self.classes[called([replace(run, test=predicted)], self.metrics[experiment], self.classes)[0]]
        of = self.shown[label]
        return {
            "uri": figures.jpeg(drawn.attention(attention)),
            "caption": experiment,
            "note": f"P({of}) = {predicted[f'prob_{of}'].iloc[0]:.2f}",
            "alt": f"Attention of {experiment} on slide {example.slide_id}, called {call}",
        }


def attentive(experiments: Sequence[Mapping[str, Any]], runs: Mapping[str, Sequence[Run]]) -> list[Mapping[str, Any]]:
    """The experiments whose models prefer patches at all: mean pooling gives each the same, which is no picture."""
    return [e for e in experiments if looks_somewhere(runs[e["name"]][0])]


def looks_somewhere(run: Run) -> bool:
    with np.load(run.folder / "attention.npz") as attention:
        return any(np.ptp(attention[slide_id]) > 0 for slide_id in attention.files)
