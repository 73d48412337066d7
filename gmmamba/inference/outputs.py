"""What is written of one predicted slide, into its folder (docs/predict.md says how to read it).

record.json          versions, hashes, settings, logits and probabilities of every model
patches.csv          a row a patch: `x, y` (level-0 pixels), `attention`, `contribution`, `evidence`, `group`,
                     `kept`
heatmap.png          the map of contributions, or of attention where there are none
evidence.png         the map of evidence
attention.png        the map of attention
groups.png           the groups with their importance
annotations.geojson  for QuPath: outlines of groups, the patches of highest and lowest contribution
heatmap.geojson      for QuPath: every patch as a detection with measurements
heatmap.ome.tif      the maps as a pyramid, in µm
patches.json, .jpg   the patches of highest and lowest contribution, as the encoder saw them
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from gmmamba import __version__
from gmmamba.cohort import Slide
from gmmamba.data import LabelledBag
from gmmamba.inference.explain import Contributions
from gmmamba.inference.model_file import Ensemble
from gmmamba.inference.ome import raster, write_ome
from gmmamba.inference.pictures import SlideMap, attention_colours, contribution_colours, group_colour
from gmmamba.inference.preparation import Preparation
from gmmamba.inference.qupath import collection, feature, group_outlines, patch_boxes
from slidestore import content_digest
from slidestore.atomic import replace_when_whole

HIGHEST, LOWEST = (213, 94, 0), (0, 114, 178)


@dataclass(frozen=True)
class Prediction:
    """What the models of an ensemble say of one slide.

    logits (M, C) float32, probabilities (M, C) float64 of the M models; attention (N,) the mean of theirs, each summing
    to 1, or None; kept (N,) the share of models whose mask kept the patch, None without masks. target: the class that
    contributions and evidence are of, the second of two, else the predicted one. contributions: one a model, empty if
    not asked for; evidence (N,), group_contributions, by group: means over the models.
    """

    slide: Slide
    bag: LabelledBag
    logits: NDArray[np.float32]
    probabilities: NDArray[np.float64]
    attention: NDArray[np.float64] | None
    kept: NDArray[np.float64] | None
    target: int
    contributions: list[Contributions]
    evidence: NDArray[np.float64] | None
    group_contributions: dict[int, float]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Probabilities (C,)."""
        return self.probabilities.mean(axis=0)

    @property
    def predicted(self) -> int:
        return int(self.mean.argmax())

    @property
    def contribution(self) -> NDArray[np.float64] | None:
        """(N,), the mean over the models."""
        return np.mean([found.values for found in self.contributions], axis=0) if self.contributions else None


def write_slide(
    folder: Path,
    found: Prediction,
    ensemble: Ensemble,
    preparation: Preparation,
    record: Mapping[str, Any],
    device: torch.device,
    top: int,
) -> None:
    """Write the folder of one slide anew; `record` is its tile record, `top` the patches of each end to show."""
    if folder.exists():
        shutil.rmtree(folder)
    table = patch_table(found)
    with replace_when_whole(folder / "patches.csv") as part:
        table.to_csv(part, index=False)
    _write_pictures(folder, found, ensemble, preparation)
    measure = "contribution" if "contribution" in table else "attention"
    if measure in table:
        order = np.argsort(-table[measure].to_numpy(), kind="stable")
        n = min(top, len(order) // 2)
        ends = {"highest": order[:n], "lowest": order[::-1][:n]}
        _write_patches(folder, found, table, measure, ends, ensemble)
        _write_maps(folder, found, table, measure)
    else:
        ends = {}
    _write_annotations(folder, found, table, measure, ends)
    _write_json(folder / "record.json", _record(found, ensemble, preparation, record, device))


def patch_table(found: Prediction) -> pd.DataFrame:
    """The table of patches.csv; columns that the models have no values for are left out."""
    x, y = found.bag.store.coords.T
    columns: dict[str, Any] = {"x": x, "y": y}
    if found.attention is not None:
        columns["attention"] = found.attention
    if found.contribution is not None:
        columns["contribution"] = found.contribution
    if found.evidence is not None:
        columns["evidence"] = found.evidence
    if found.bag.groups is not None:
        columns["group"] = found.bag.groups.numpy()
    if found.kept is not None:
        columns["kept"] = found.kept
    return pd.DataFrame(columns)


def _importance(found: Prediction) -> dict[int, float]:
    """By group, the attention of its patches together: of GMMamba the group's importance, that CSS documents."""
    if found.bag.groups is None or found.attention is None:
        return {}
    sums = np.bincount(found.bag.groups.numpy(), weights=found.attention)
    return {int(label): float(sums[label]) for label in np.unique(found.bag.groups.numpy())}


def _relative(found: Prediction) -> NDArray[np.float64]:
    """Attention as a multiple of the mean patch's."""
    assert found.attention is not None
    return found.attention * len(found.attention)


def _write_pictures(folder: Path, found: Prediction, ensemble: Ensemble, preparation: Preparation) -> None:
    store, slide_id = found.bag.store, found.slide.slide_id
    side, width = store.attributes.patch_px_level0, store.attributes.level0_width
    assert side is not None
    assert width is not None
    drawn = SlideMap(preparation.tiles(slide_id, ".thumbnail.jpg"), store.coords, side, width)
    classes, models = ensemble.classes, len(ensemble.members)
    said = f"{slide_id}: {classes[found.predicted]}, p = {found.mean[found.predicted]:.3f}"
    said += f", {models} models" if models > 1 else ""
    pictures: dict[str, Image.Image] = {}
    if found.attention is not None:
        pictures["attention.png"] = drawn.attention(_relative(found), f"{said}. Attention")
    if found.contribution is not None:
        name = classes[found.target]
        title = f"{said}. What each patch adds to the log-odds of {name}"
        pictures["heatmap.png"] = drawn.contribution(found.contribution, name, title)
        assert found.evidence is not None
        title = f"{said}. Log-odds of {name} of each patch alone"
        pictures["evidence.png"] = drawn.contribution(found.evidence, name, title)
    elif found.attention is not None:
        pictures["heatmap.png"] = pictures["attention.png"]
    if found.bag.groups is not None:
        title = f"{said}. Groups" + (", with their importance" if found.attention is not None else "")
        title += "; pale: dropped by the mask" if found.kept is not None and found.kept.min() < 1 else ""
        pictures["groups.png"] = drawn.groups(found.bag.groups.numpy(), _importance(found), found.kept, title)
    for file, picture in pictures.items():
        with replace_when_whole(folder / file) as part:
            picture.save(part, format="PNG", optimize=True)


def _write_patches(
    folder: Path, found: Prediction, table: pd.DataFrame, measure: str, ends: Mapping[str, NDArray[np.int64]],
    ensemble: Ensemble,
) -> None:  # fmt: skip
    what = f"contribution to {ensemble.classes[found.target]}" if measure == "contribution" else "attention"
    rows = []
    for end, chosen in ends.items():
        patches = [
            {"x": int(table["x"][i]), "y": int(table["y"][i]), "caption": f"{table[measure][i]:+.3g}"} for i in chosen
        ]
        rows.append({"title": f"{found.slide.slide_id}: {end} {what}", "patches": patches})
    if len(ends["highest"]):
        _write_json(folder / "patches.json", {"path": str(found.slide.path), "rows": rows})


def _write_maps(folder: Path, found: Prediction, table: pd.DataFrame, measure: str) -> None:
    store, slide_id = found.bag.store, found.slide.slide_id
    attributes = store.attributes
    side, size = attributes.patch_px_level0, (attributes.level0_width, attributes.level0_height)
    assert side is not None
    assert size[0] is not None
    assert size[1] is not None
    assert attributes.level0_mpp is not None
    values = {
        name: table[name].to_numpy() for name in ("contribution", "evidence", "attention", "kept") if name in table
    }
    if found.attention is not None:
        values["attention"] = _relative(found)
    colours = contribution_colours(values[measure])[0] if measure == "contribution" else None
    colours = attention_colours(values[measure])[0] if colours is None else colours
    boxes = patch_boxes(store.coords, side)
    detections = []
    for i, box in enumerate(boxes):
        measured = {name: column[i] for name, column in values.items()}
        if found.bag.groups is not None:
            measured["group"] = int(found.bag.groups[i]) + 1
        red, green, blue = colours[i].tolist()
        detections.append(feature(slide_id, "detection", f"Patch {i}", box, measured, colour=(red, green, blue)))
    _write_json(folder / "heatmap.geojson", collection(detections), indent=None)
    channels, pixel = {}, 0.0
    for name, column in values.items():
        channels[name], pixel = raster(store.coords, side, (size[0], size[1]), column)
    write_ome(folder / "heatmap.ome.tif", channels, pixel * attributes.level0_mpp)


def _write_annotations(
    folder: Path, found: Prediction, table: pd.DataFrame, measure: str, ends: Mapping[str, NDArray[np.int64]]
) -> None:
    store, slide_id = found.bag.store, found.slide.slide_id
    side = store.attributes.patch_px_level0
    assert side is not None
    features = []
    if found.bag.groups is not None:
        labels, importance = found.bag.groups.numpy(), _importance(found)
        for label, outline in group_outlines(store.coords, side, labels).items():
            measured: dict[str, float] = {"patches": int((labels == label).sum())}
            measured |= {"importance": importance[label]} if label in importance else {}
            if label in found.group_contributions:
                measured["contribution when left out"] = found.group_contributions[label]
            name = f"Group {label + 1}"
            colour = group_colour(label)
            features.append(feature(slide_id, "annotation", name, outline, measured, name, colour))
    boxes = patch_boxes(store.coords, side)
    for (end, chosen), colour in zip(ends.items(), (HIGHEST, LOWEST), strict=False):
        for rank, i in enumerate(chosen, start=1):
            measured = {name: table[name][i] for name in ("contribution", "evidence", "attention") if name in table}
            kind = f"{end.capitalize()} {measure}"
            features.append(feature(slide_id, "annotation", f"{kind} {rank}", boxes[i], measured, kind, colour))
    _write_json(folder / "annotations.geojson", collection(features))


def _record(
    found: Prediction,
    ensemble: Ensemble,
    preparation: Preparation,
    record: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    store, classes = found.bag.store, ensemble.classes
    attributes = store.attributes
    contribution: dict[str, Any] | None = None
    if found.contribution is not None:
        contribution = {
            "of": f"log-odds of {classes[found.target]}",
            "method": "integrated gradients from the slide's mean patch (docs/predict.md)",
            "sum": float(found.contribution.sum()),
            "log_odds": float(np.mean([one.total for one in found.contributions])),
            "log_odds_of_the_mean_patch": float(np.mean([one.baseline for one in found.contributions])),
            "largest_residual_of_a_model": max((one.residual for one in found.contributions), key=abs),
        }
    members = []
    for i, (member, card) in enumerate(zip(ensemble.members, ensemble.card["members"], strict=True)):
        members.append({
            "fold": member.fold, "seed": member.seed, "weights_sha256": member.sha256,
            "trained_with": {name: card[name] for name in ("gmmamba_version", "torch_version", "device")},
            "logits": dict(zip(classes, found.logits[i].tolist(), strict=True)),
            "probabilities": dict(zip(classes, found.probabilities[i].tolist(), strict=True)),
        })  # fmt: skip
    return {
        "slide_id": found.slide.slide_id,
        "predicted": classes[found.predicted],
        "probabilities": dict(zip(classes, found.mean.tolist(), strict=True)),
        "slide": {"path": str(found.slide.path), **attributes.source, "level0_mpp": attributes.level0_mpp,
                  "mpp_source": record["mpp_source"]},
        "patches": {"used": len(store.coords), "damaged": attributes.damaged, "tiling_hash": attributes.tiling_hash,
                    "features": content_digest(store.path), "reader": attributes.reader},
        "warnings": [*record["warnings"], *attributes.warnings],
        "contributions": contribution,
        "groups": {
            str(label + 1): {"importance": _importance(found).get(label), "contribution_when_left_out": value}
            for label, value in found.group_contributions.items()
        },
        "model": {"path": str(ensemble.path), "dataset": ensemble.card["dataset"], "classes": classes,
                  "experiment": ensemble.card["experiment"], "members": members},
        "encoder": {**preparation.encoder, "weights_sha256": attributes.encoder_weights_sha256},
        "tiling": dict(preparation.tiling),
        "reading": dict(preparation.reading),
        "reading_in_training": dict(ensemble.pipeline.reading),
        "versions": {"gmmamba": __version__, "features_by": attributes.created_by, "torch": torch.__version__,
                     "numpy": np.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": preparation.threads,
        "logits_checked": "a second forward pass gave the same bits",
    }  # fmt: skip


def _write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    with replace_when_whole(path) as part:
        part.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
