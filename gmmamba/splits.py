"""split_dataset: which slides are trained on, chosen by and tested on, in each fold.

Reads the slide tables of a dataset's cohorts; writes splits.csv, one row a ready slide: `slide_id, cohort,
patient_id, label, fold0, fold1, ...` with values train, val or test. A patient is never in two parts of a fold
(patients of several cohorts that share a patient_id are one patient), and parts are stratified by label.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gmmamba.slide_tables import read_slide_tables
from gmmamba.split_files import PARTS, Member, SplitError, fold_names, read_split_file, split_file_problems
from slidestore.atomic import replace_when_whole

FILES = ("file", "clam")  # schemes that take the parts as they are
GOES_BY = {  # what a scheme goes by, besides labels: of this, a patient must have one
    "column": "split",
    "external": "side",
    "leave_one_cohort_out": "cohort",
    "site_preserved": "site",
}


@dataclass(frozen=True)
class SplitSettings:
    """How a dataset is split.

    scheme        kfold: the test parts of the `folds` folds share out all patients, 1/folds each;
                  ratio: `folds` independent random draws; column: the sheet's `split` column, as fold 0;
                  external: all of `test_cohorts` is the test part of every fold, and the validation parts of the
                  `folds` folds share out the patients of the other cohorts;
                  leave_one_cohort_out: a fold a cohort (in alphabetical order), whose test part is that cohort;
                  site_preserved: as kfold, but of whole sites, the sheet's `site` column;
                  file: as `path` has it, a file like splits.csv; clam: as the splits_k.csv in the folder `path`
    test          share of all patients that a draw of `ratio` tests
    validation    share of patients to choose the epoch by: of all (ratio), of those not tested (kfold,
                  leave_one_cohort_out; site_preserved, to the nearest 1/n)
    test_cohorts  for external
    path          for file and clam
    """

    scheme: Literal[
        "kfold", "ratio", "column", "external", "leave_one_cohort_out", "site_preserved", "file", "clam"
    ] = "kfold"
    folds: int = 5
    test: float = 0.2
    validation: float = 0.2
    seed: int = 0
    test_cohorts: Sequence[str] = ()
    path: str | None = None

    def count_folds(self, cohorts: Sequence[str]) -> int:
        """The number of folds of a dataset of these cohorts."""
        return {"column": 1, "leave_one_cohort_out": len(cohorts)}.get(self.scheme, self.folds)

    def goes_by(self, cohort: str, split: str, site: str) -> str:
        """What this scheme goes by, of a slide of that cohort with these cells in its sheet; "" where it is blank."""
        side = "tested" if cohort in self.test_cohorts else "not tested"
        values = {"split": split, "side": side, "cohort": cohort, "site": site}
        return values.get(GOES_BY.get(self.scheme, ""), "")


def patient_folds(
    labels: Mapping[str, str],
    classes: list[str],
    settings: SplitSettings,
    given: Mapping[str, str] | None = None,
) -> list[dict[str, str]]:
    """The part of every patient in every fold: one dict patient_id -> train | val | test a fold.

    labels: patient_id -> label; given: patient_id -> what the scheme goes by (`SplitSettings.goes_by`), for the
    schemes of `GOES_BY`. The result depends on the set of patients and on `settings`, not on the order of `labels`.

    Raises SplitError where a part of a fold would lack a class, naming class, fold and remedy.
    """
    patients = np.array(sorted(labels))
    y = np.array([classes.index(labels[patient]) for patient in patients])
    rng = np.random.default_rng(settings.seed)
    by = np.array([])
    if settings.scheme in GOES_BY:
        assert given is not None, f"the scheme {settings.scheme} needs the {GOES_BY[settings.scheme]} of each patient"
        by = np.array([given[patient] for patient in patients])

    # Every branch gives (test, val) a fold: (P,) bool each.
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    if settings.scheme == "column":
        drawn = [(by == "test", by == "val")]
    elif settings.scheme == "kfold":
        for test in _stratified(y, settings.folds, settings.seed, classes, "test"):
            drawn.append((test, _within(~test, _draw(y[~test], settings.validation, rng))))
    elif settings.scheme == "external":
        test = by == "tested"
        for val in _stratified(y[~test], settings.folds, settings.seed, classes, "validation"):
            drawn.append((test, _within(~test, val)))
    elif settings.scheme == "leave_one_cohort_out":
        for cohort in np.unique(by):
            test = by == cohort
            drawn.append((test, _within(~test, _draw(y[~test], settings.validation, rng))))
    elif settings.scheme == "site_preserved":
        for test in _whole_sites(y, by, settings.folds, settings.seed, classes):
            rest, parts = y[~test], max(2, round(1 / settings.validation))
            held = _whole_sites(rest, by[~test], parts, settings.seed, classes)
            shares = [np.bincount(rest[val], minlength=len(classes)) / np.bincount(rest) for val in held]
            nearest = int(np.argmin([((share - 1 / parts) ** 2).sum() for share in shares]))
            drawn.append((test, _within(~test, held[nearest])))
    else:
        for _ in range(settings.folds):
            test = _draw(y, settings.test, rng)
            # The share of all patients is a larger share of the ones that are left.
            drawn.append((test, _within(~test, _draw(y[~test], settings.validation / (1 - settings.test), rng))))
    folds = [
        dict(zip(map(str, patients), np.select([test, val], ["test", "val"], "train").tolist(), strict=True))
        for test, val in drawn
    ]
    _check_parts(folds, labels, classes, settings)
    return folds


def _within(members: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(P,) bool: those of the `members` (P,) that are `chosen` (one bool a member)."""
    result = np.zeros(len(members), bool)
    result[np.flatnonzero(members)[chosen]] = True
    return result


def _draw(y: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """(P,) bool: a random `share` of each class of y (P,), rounded, but at least one patient of each."""
    drawn = np.zeros(len(y), bool)
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        drawn[members[: max(1, round(share * len(members)))]] = True
    return drawn


def _stratified(y: np.ndarray, folds: int, seed: int, classes: list[str], part: str) -> list[np.ndarray]:
    """The patients of y (P,) shared out to `folds` parts, (P,) bool each, every class as evenly as can be."""
    from sklearn.model_selection import StratifiedKFold  # here: it takes a second, and most stages only read

    if folds < 2:
        raise SplitError(f"{folds} fold leaves nothing to train on: use 2 or more, or the scheme ratio")
    for index, name in enumerate(classes):
        if (count := int((y == index).sum())) < folds:
            fewer = f"use at most {count} folds, or " if count > 1 else ""
            raise SplitError(
                f"class {name!r} has {count} patients to share out, too few for {folds} folds: the {part} part of "
                f"fold {count} would have none; {fewer}add slides of that class"
            )
    shuffled = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return [np.isin(np.arange(len(y)), held) for _, held in shuffled.split(y, y)]


def _whole_sites(y: np.ndarray, sites: np.ndarray, folds: int, seed: int, classes: list[str]) -> list[np.ndarray]:
    """The patients of y (P,) shared out by whole sites to `folds` parts, (P,) bool each, every class nearly evenly."""
    from sklearn.model_selection import StratifiedGroupKFold

    if folds < 2:
        raise SplitError(f"{folds} fold leaves nothing to train on: use 2 or more, or the scheme ratio")
    for index, name in enumerate(classes):
        if (count := len(np.unique(sites[y == index]))) < folds:
            raise SplitError(
                f"class {name!r} comes from {count} sites, too few to share them out to {folds} parts: use fewer "
                f"folds, a larger validation share, or add slides of that class from other sites"
            )
    greedy = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return [np.isin(np.arange(len(y)), held) for _, held in greedy.split(y, y, sites)]


def _check_parts(
    folds: list[dict[str, str]], labels: Mapping[str, str], classes: list[str], settings: SplitSettings
) -> None:
    remedy = {
        "kfold": "use fewer folds or a smaller validation share",
        "ratio": "use smaller shares for test and validation",
        "column": "mend the sheet's split column",
        "external": "choose a cohort with every class to test on, or fewer folds",
        "leave_one_cohort_out": "leave out the classes or the cohorts that are not everywhere, or use the scheme kfold",
        "site_preserved": "use fewer folds, so that each part gets a site with that class",
    }[settings.scheme]
    for fold, parts in enumerate(folds):
        held = {(part, labels[patient]) for patient, part in parts.items()}
        for part in PARTS:
            for name in classes:
                if (part, name) not in held:
                    raise SplitError(
                        f"fold {fold} has no patient of class {name!r} in its {part} part: {remedy}, or add slides "
                        f"of that class"
                    )


def split_dataset(slide_tables: Mapping[str, Path], classes: list[str], settings: SplitSettings, output: Path) -> None:
    """Split the ready slides of a dataset (slide_tables: cohort -> CSV) and write splits.csv to `output`.

    Raises SplitError: see `patient_folds` and `parts_of_file`; also for a patient with two labels, or two of what the
    scheme goes by (two parts, two sites, a cohort that is tested and one that is not).
    """
    slides = read_slide_tables(slide_tables)
    lost = slides.loc[slides["status"] != "ready", "slide_id"].tolist()
    slides = slides[slides["status"] == "ready"]
    table = slides[["slide_id", "cohort", "patient_id", "label"]].copy()
    if settings.scheme in FILES:
        parts = parts_of_file(
            settings, {s: Member(p, y) for s, _, p, y in table.itertuples(index=False)}, classes, lost
        )
        table = table.join(parts, on="slide_id")
    else:
        for fold, of in enumerate(drawn_parts(slides, classes, settings)):
            table[f"fold{fold}"] = table["patient_id"].map(of)
    with replace_when_whole(output) as part:
        table.to_csv(part, index=False)


def parts_of_file(
    settings: SplitSettings,
    slides: Mapping[str, Member],
    classes: list[str],
    left_out: Sequence[str] = (),
    complete: bool = True,
) -> pd.DataFrame:
    """The parts that the file of a split has for `slides`, by slide_id; SplitError lists all that is wrong with it, as
    `split_file_problems` finds it."""
    assert settings.path is not None, "the configuration is checked for it"
    path = Path(settings.path)
    table = read_split_file(path, settings.scheme)
    if problems := split_file_problems(table, slides, classes, path, left_out, complete):
        raise SplitError("\n".join(problems))
    return table.reindex(list(slides))[fold_names(table)]


def drawn_parts(slides: pd.DataFrame, classes: list[str], settings: SplitSettings) -> list[dict[str, str]]:
    """patient_id -> part, one dict a fold, of slides (rows of slide tables)."""
    labels = _one_per_patient(slides, "label", classes)
    given = None
    if column := GOES_BY.get(settings.scheme):
        cells = (slides[name] if name in slides else [""] * len(slides) for name in ("cohort", "split", "site"))
        values = [settings.goes_by(*row) for row in zip(*cells, strict=True)]
        given = _one_per_patient(slides.assign(**{column: values}), column, PARTS if column == "split" else None)
    return patient_folds(labels, classes, settings, given)


def _one_per_patient(slides: pd.DataFrame, column: str, known: Sequence[str] | None) -> dict[str, str]:
    """patient_id -> the one value that its slides have in `column`: one of `known`, or any but an empty one."""
    values: dict[str, str] = {}
    for slide_id, patient, value in slides[["slide_id", "patient_id", column]].itertuples(index=False):
        if known is not None and value not in known:
            raise SplitError(f"slide {slide_id}: {column} {value!r} is none of {', '.join(known)}; mend the sheet")
        if not value:
            raise SplitError(f"slide {slide_id} has no {column}: fill the sheet's column, or choose another scheme")
        if values.setdefault(patient, value) != value:
            raise SplitError(
                f"patient {patient} has {column} {values[patient]!r} and {value!r} (slide {slide_id}): a patient "
                f"must have one; mend the sheet"
            )
    return values
