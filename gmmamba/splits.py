"""split_dataset: which slides are trained on, chosen by and tested on, in each fold.

Reads the slide tables of a dataset's cohorts; writes splits.csv, one row a ready slide: `slide_id, cohort,
patient_id, label, fold0, fold1, ...` with values train, val or test. A patient is never in two parts of a fold
(patients of several cohorts that share a patient_id are one patient), and parts are stratified by label.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from slidestore.atomic import replace_when_whole

PARTS = ("train", "val", "test")


class SplitError(ValueError):
    """Slides that cannot be split as asked; the message names the class or the slide, and the remedy."""


@dataclass(frozen=True)
class SplitSettings:
    """How a dataset is split.

    scheme      kfold: the test parts of the `folds` folds share out all patients, 1/folds each;
                ratio: `folds` independent random draws; column: the sheet's `split` column, as fold 0
    test        share of all patients that a draw of `ratio` tests
    validation  share of patients to choose the epoch by: of all (ratio), of those not tested (kfold)
    """

    scheme: Literal["kfold", "ratio", "column"] = "kfold"
    folds: int = 5
    test: float = 0.2
    validation: float = 0.2
    seed: int = 0


def patient_folds(
    labels: Mapping[str, str],
    classes: list[str],
    settings: SplitSettings,
    given: Mapping[str, str] | None = None,
) -> list[dict[str, str]]:
    """The part of every patient in every fold: one dict patient_id -> train | val | test a fold.

    labels: patient_id -> label; given: patient_id -> part, what the sheet says (scheme column only). The result
    depends on the set of patients and on `settings`, not on the order of `labels`.

    Raises SplitError where a part of a fold would lack a class, naming class, fold and remedy.
    """
    patients = np.array(sorted(labels))
    y = np.array([classes.index(labels[patient]) for patient in patients])
    rng = np.random.default_rng(settings.seed)
    if settings.scheme == "column":
        assert given is not None, "the scheme column needs the parts that the sheet gives"
        folds = [{str(patient): given[patient] for patient in patients}]
    elif settings.scheme == "kfold":
        for index, name in enumerate(classes):
            if (count := int((y == index).sum())) < settings.folds:
                raise SplitError(
                    f"class {name!r} has {count} patients, too few for {settings.folds} folds: the test part of "
                    f"fold {count} would have none; use at most {count} folds, or add slides of that class"
                )
        from sklearn.model_selection import StratifiedKFold  # here: it takes a second, and most stages only read

        shuffled = StratifiedKFold(settings.folds, shuffle=True, random_state=settings.seed)
        folds = []
        for rest, test in shuffled.split(patients, y):
            parts = dict.fromkeys(map(str, patients[test]), "test")
            validation = _draw(y[rest], settings.validation, rng)
            parts |= dict.fromkeys(map(str, patients[rest][~validation]), "train")
            folds.append(parts | dict.fromkeys(map(str, patients[rest][validation]), "val"))
    else:
        folds = []
        for _ in range(settings.folds):
            test = _draw(y, settings.test, rng)
            # The share of all patients is a larger share of the ones that are left.
            validation = _draw(y[~test], settings.validation / (1 - settings.test), rng)
            parts = dict.fromkeys(map(str, patients[test]), "test")
            parts |= dict.fromkeys(map(str, patients[~test][~validation]), "train")
            folds.append(parts | dict.fromkeys(map(str, patients[~test][validation]), "val"))
    _check_parts(folds, labels, classes, settings)
    return folds


def _draw(y: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """(P,) bool: a random `share` of each class of y (P,), rounded, but at least one patient of each."""
    drawn = np.zeros(len(y), bool)
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        drawn[members[: max(1, round(share * len(members)))]] = True
    return drawn


def _check_parts(
    folds: list[dict[str, str]], labels: Mapping[str, str], classes: list[str], settings: SplitSettings
) -> None:
    remedy = {
        "kfold": "use fewer folds or a smaller validation share",
        "ratio": "use smaller shares for test and validation",
        "column": "mend the sheet's split column",
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


def read_slide_tables(slide_tables: Mapping[str, Path]) -> pd.DataFrame:
    """The slide tables of several cohorts as one, with a column `cohort`; every value a string, absent ones ""."""
    tables = [
        pd.read_csv(path, dtype=str, keep_default_na=False).assign(cohort=cohort)
        for cohort, path in slide_tables.items()
    ]
    return pd.concat(tables, ignore_index=True)


def split_dataset(slide_tables: Mapping[str, Path], classes: list[str], settings: SplitSettings, output: Path) -> None:
    """Split the ready slides of a dataset (slide_tables: cohort -> CSV) and write splits.csv to `output`.

    Raises SplitError: see `patient_folds`; also for a patient with two labels or, for the scheme column, two parts.
    """
    slides = read_slide_tables(slide_tables)
    slides = slides[slides["status"] == "ready"]
    labels = _one_per_patient(slides, "label", classes)
    given = _one_per_patient(slides, "split", list(PARTS)) if settings.scheme == "column" else None
    folds = patient_folds(labels, classes, settings, given)
    table = slides[["slide_id", "cohort", "patient_id", "label"]].copy()
    for fold, parts in enumerate(folds):
        table[f"fold{fold}"] = table["patient_id"].map(parts)
    with replace_when_whole(output) as part:
        table.to_csv(part, index=False)


def _one_per_patient(slides: pd.DataFrame, column: str, known: list[str]) -> dict[str, str]:
    """patient_id -> the one value that its slides have in `column`, which must be one of `known`."""
    if column not in slides:
        raise SplitError(f"the slide tables have no column {column!r}: add it to the sheet, or choose another scheme")
    values: dict[str, str] = {}
    for slide_id, patient, value in slides[["slide_id", "patient_id", column]].itertuples(index=False):
        if value not in known:
            raise SplitError(f"slide {slide_id}: {column} {value!r} is none of {', '.join(known)}; mend the sheet")
        if values.setdefault(patient, value) != value:
            raise SplitError(
                f"patient {patient} has {column} {values[patient]!r} and {value!r} (slide {slide_id}): a patient "
                f"must have one; mend the sheet"
            )
    return values
