"""predict: the probabilities of new slides by a trained experiment, and what they come from.

Reads a trained experiment (model_file.py) and slides; prepares them (preparation.py), or takes what is prepared. Writes
  predictions.csv   a row a slide: `slide_id, path, status, reason, [true,] predicted`, prob_<class> (mean over the
                    models), `agreement` (share of the models whose class is the predicted one), `models, n_patches,
                    mpp, in_training, warnings`; a failed slide has its reason
  members.csv       a row a slide and model: `slide_id, fold, seed, predicted`, prob_<class>
  slides/{slide}/   what explains the prediction (outputs.py)

Attention and logits come from one forward pass; another one, after all else was computed, must give the same bits.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmmamba.cohort import Slide
from gmmamba.data import BagReader, LabelledBag
from gmmamba.grouping import group_coords, group_features, parse_grouping
from gmmamba.inference.explain import (
    group_contributions,
    mean_attention,
    patch_contributions,
    patch_evidence,
)
from gmmamba.inference.model_file import Ensemble
from gmmamba.inference.outputs import Prediction, write_slide
from gmmamba.inference.pipeline import InferenceError, slide_mark
from gmmamba.inference.preparation import Preparation
from gmmamba.models.bag import MILOutput
from gmmamba.prediction import choose_device, make_repeatable
from slidestore import SlideStore, open_store
from slidestore.atomic import replace_when_whole
from slidestore.progress import progress_bar

log = logging.getLogger(__name__)


def predict_slides(
    ensemble: Ensemble, slides: list[Slide], preparation: Preparation, prepared: bool, quick: bool, top: int
) -> pd.DataFrame:
    """Predict all slides and write everything; the table of predictions.csv.

    prepared: whether tiles and features are in preparation.output already. quick: attention alone is shown, no
    contributions and no evidence. top: patches of the picture with the highest and lowest, each. Raises
    InferenceError for labels and features that are not of this model, before anything is predicted; a slide that
    cannot be read, or errs, costs itself. If all err, the first error is raised when the tables are written.
    """
    classes = ensemble.classes
    for slide in slides:
        if slide.label and slide.label not in classes:
            raise InferenceError(
                f"slide {slide.slide_id} has the label {slide.label!r}, the model's classes are {', '.join(classes)}: "
                "mend the sheet, or take the column out"
            )
    problems = {} if prepared else preparation.prepare(slides)
    device = choose_device()
    make_repeatable(ensemble.members[0].seed, preparation.threads)
    for member in ensemble.members:
        member.model.to(device)
    for slide in slides:
        if slide.slide_id not in problems:
            store, record = _open(ensemble, preparation, slide)
            if (failure := _failure(store)) is not None:
                problems[slide.slide_id] = failure
            else:
                check_features(ensemble, store, record, preparation.tiling)
    for old in preparation.output.glob("slides/*/patches.csv"):  # of an earlier run, perhaps by another model
        shutil.rmtree(old.parent)
    rows, of_members, errors = [], [], []
    for slide in progress_bar(slides, desc="predicting", unit="slides"):
        reason = problems.get(slide.slide_id)
        row: dict[str, Any] = {"slide_id": slide.slide_id, "path": slide.path, "status": "failed", "reason": reason}
        rows.append(row)
        if reason is not None:
            continue
        folder = preparation.output / "slides" / slide.slide_id
        try:
            store, record = _open(ensemble, preparation, slide)
            found = predict_slide(ensemble, slide, store, preparation, device, quick)
            write_slide(folder, found, ensemble, preparation, record, device, top)
        except Exception as error:  # whatever it is: the other slides' hours of work are not lost for it
            log.warning("slide %s", slide.slide_id, exc_info=True)
            row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            errors.append(error)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            row |= {"status": "predicted", **_row(found, ensemble, record)}
            of_members += _member_rows(found, ensemble)
    if not prepared and (problem := preparation.picture_patches()) is not None:
        log.warning("the pictures of patches: %s", problem)
    columns = ["slide_id", "path", "status", "reason", *(["true"] if any(slide.label for slide in slides) else [])]
    columns += ["predicted", *(f"prob_{name}" for name in classes), "agreement", "models", "n_patches", "mpp"]
    table = pd.DataFrame(rows, columns=[*columns, "in_training", "warnings"])
    names = ["slide_id", "fold", "seed", "predicted", *(f"prob_{name}" for name in classes)]
    with replace_when_whole(preparation.output / "members.csv") as part:
        pd.DataFrame(of_members, columns=names).to_csv(part, index=False)
    with replace_when_whole(preparation.output / "predictions.csv") as part:
        table.astype({"models": "Int64", "n_patches": "Int64"}).to_csv(part, index=False)
    if errors and not of_members:
        raise errors[0]
    return table


def _open(ensemble: Ensemble, preparation: Preparation, slide: Slide) -> tuple[SlideStore, dict[str, Any]]:
    """The features of a slide and its tile record."""
    store = open_store(preparation.store(slide.slide_id), ensemble.card["encoder"])
    return store, json.loads(preparation.tiles(slide.slide_id, ".json").read_text(encoding="utf-8"))


def _failure(store: SlideStore) -> str | None:
    """The reason, with the remedy for slides that are no cohort of the config."""
    failure, cohort = store.attributes.failure, store.attributes.cohort
    return None if failure is None else failure["reason"].replace(f"cohorts.{cohort}.mpp", f"predictions.{cohort}.mpp")


def check_features(ensemble: Ensemble, store: SlideStore, record: Mapping[str, Any], tiling: Mapping[str, Any]) -> None:
    """Raise InferenceError unless a slide was tiled and encoded as the slides that the models were trained on."""
    attributes, card = store.attributes, ensemble.card
    if attributes.encoder_weights_sha256 != card["encoder_weights_sha256"]:
        raise InferenceError(
            f"{store.path}: features of {attributes.encoder} with weights"
            f" {(attributes.encoder_weights_sha256 or '')[:12]}, {ensemble.path} was trained on those with"
            f" {card['encoder_weights_sha256'][:12]}: give the file that training used with --encoder-weights"
        )
    if record["tiling_hash"] != attributes.tiling_hash:
        raise InferenceError(f"{store.path} is not of the patches in the tile record: encode the slide again")
    for key, value in tiling.items():
        if record["settings"][key] != value:
            raise InferenceError(
                f"slide {attributes.slide_id} was tiled with {key} {record['settings'][key]}, the slides that"
                f" {ensemble.path} was trained on with {value}: tile it with the training's settings"
            )


def group_slide(grouping: str | None, coords: Path, store: SlideStore) -> Tensor | None:
    """(N,) int64 groups of the store's patches, as the cohort stages make them; coords: the .npy of the tile stage."""
    if grouping is None:
        return None
    if grouping.startswith("features-"):
        labels = group_features(store.features, int(grouping.removeprefix("features-")))
        return torch.from_numpy(labels.astype(np.int64))
    tiled = np.load(coords)
    found = dict(zip(map(tuple, tiled.tolist()), group_coords(tiled, *parse_grouping(grouping)).tolist(), strict=True))
    return torch.tensor([found[place] for place in map(tuple, store.coords.tolist())], dtype=torch.int64)


def predict_slide(
    ensemble: Ensemble, slide: Slide, store: SlideStore, preparation: Preparation, device: torch.device, quick: bool
) -> Prediction:
    """Every model's logits and attention of one slide, and what its patches and groups contribute."""
    groups = group_slide(ensemble.grouping, preparation.tiles(slide.slide_id, ".npy"), store)
    item = LabelledBag(slide.slide_id, slide.patient_id, "new", -1, store, groups)
    bag = BagReader(device, budget=0).prepare(item)
    outputs: list[MILOutput] = []
    with torch.no_grad():
        for member in ensemble.members:
            outputs.append(member.model(bag))
    logits = torch.cat([output.logits.float() for output in outputs]).cpu()
    # In float64, as in the evaluation: the same bits.
    probabilities = torch.cat([row[None].double().softmax(dim=1) for row in logits]).numpy()
    target = 1 if len(ensemble.classes) == 2 else int(probabilities.mean(axis=0).argmax())
    contributions, evidence, without = [], [], []
    for member, output in zip(() if quick else ensemble.members, outputs, strict=not quick):
        contributions.append(patch_contributions(member.model, bag, output, target))
        evidence.append(patch_evidence(member.model, bag, target))
        without.append(group_contributions(member.model, bag, target))
    with torch.no_grad():
        again = torch.cat([member.model(bag).logits.float() for member in ensemble.members]).cpu()
    if not torch.equal(again, logits):
        raise RuntimeError(f"slide {slide.slide_id}: a second forward pass gave other logits than the maps are from")
    return Prediction(
        slide, item, logits.numpy(), probabilities,
        mean_attention([output.attention for output in outputs]), _kept(outputs, len(store.coords)), target,
        contributions,
        np.mean(evidence, axis=0) if evidence else None,
        {label: float(np.mean([one[label] for one in without])) for label in (without[0] if without else ())},
    )  # fmt: skip


def _kept(outputs: list[MILOutput], n: int) -> NDArray[np.float64] | None:
    """(N,): details of an instance are in the order of `order`."""
    if "keep" not in outputs[0].details:
        return None
    kept = np.zeros(n)
    for output in outputs:
        kept[output.details["order"].cpu().numpy()] += output.details["keep"].cpu().numpy()
    return kept / len(outputs)


def _row(found: Prediction, ensemble: Ensemble, record: Mapping[str, Any]) -> dict[str, Any]:
    classes = ensemble.classes
    votes = found.probabilities.argmax(axis=1)
    attributes = found.bag.store.attributes
    return {
        "true": found.slide.label,
        "predicted": classes[found.predicted],
        **{f"prob_{name}": value for name, value in zip(classes, found.mean, strict=True)},
        "agreement": float((votes == found.predicted).mean()),
        "models": len(votes),
        "n_patches": len(found.bag.store.coords),
        "mpp": attributes.level0_mpp,
        "in_training": "yes" if slide_mark(attributes.source) in ensemble.pipeline.known_slides else "no",
        "warnings": "; ".join([*record["warnings"], *attributes.warnings]),
    }


def _member_rows(found: Prediction, ensemble: Ensemble) -> list[dict[str, Any]]:
    return [
        {
            "slide_id": found.slide.slide_id,
            "fold": member.fold,
            "seed": member.seed,
            "predicted": ensemble.classes[int(values.argmax())],
            **{f"prob_{name}": value for name, value in zip(ensemble.classes, values, strict=True)},
        }
        for member, values in zip(ensemble.members, found.probabilities, strict=True)
    ]
