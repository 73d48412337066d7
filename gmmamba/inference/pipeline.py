"""How the slides of a dataset became the features that an experiment's models take.

A run's model.json says which encoder's features a model takes, not how a slide becomes them. pipeline.json, beside the
runs of an experiment, does (`record_pipeline`): tiling, reading and encoder as the features of its dataset were made.
Never imports torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gmmamba.slide_tables import read_slide_tables
from slidestore import StoreError, open_store
from slidestore.atomic import replace_when_whole


class InferenceError(StoreError):
    """A model, slides or features that do not go together; the message names them and the remedy."""


@dataclass(frozen=True)
class Pipeline:
    """How a slide becomes the features that a model takes.

    tiling: by cohort of the dataset, the keys of the config's `tiling`; empty where features were imported. reading,
    encoder: as in the config, the encoder with its `name`. known_slides: `slide_mark` of every slide of the dataset.
    runs: the names of the experiment's, such as fold0_seed0; its folder may hold others, left of more folds or seeds.
    """

    tiling: dict[str, dict[str, Any]]
    reading: dict[str, Any]
    encoder: dict[str, Any] | None
    known_slides: list[str]
    runs: list[str] = field(default_factory=list)  # empty in records of versions before 0.2

    def tiling_like(self, cohort: str | None, where: str) -> dict[str, Any]:
        """The tiling of one cohort, which need not be named where all have the same."""
        if not self.tiling or self.encoder is None:
            raise InferenceError(
                f"{where} was trained on imported features: how its slides became them is not known here; extract those"
                " of the new slides with the same tool, and add them as a cohort"
            )
        if cohort is not None:
            if cohort not in self.tiling:
                raise InferenceError(f"{where} knows no cohort {cohort!r}, only {', '.join(self.tiling)}")
            return self.tiling[cohort]
        first, *others = self.tiling.values()
        if any(other != first for other in others):
            raise InferenceError(
                f"the cohorts of {where} were tiled in different ways: name the one to follow with --like,"
                f" {' or '.join(self.tiling)}"
            )
        return first


def slide_mark(source: Mapping[str, Any]) -> str:
    """Sixteen hex digits that tell a slide's content, not its name, from the `source` of its store."""
    text = f"{source.get('size')}:{source.get('quickhash') or source.get('name')}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def record_pipeline(
    settings: Mapping[str, Any], slide_tables: Mapping[str, Path], models: Sequence[Path], output: Path
) -> None:
    """Write pipeline.json of an experiment.

    settings: `tiling` (by cohort), `reading`, `encoder`, as the config resolves them. models: the folders of its runs.
    Slides may have a tiling of their own in the sheet; new ones follow their cohort's. Raises InferenceError where a
    store of the dataset is not what a model was trained on.
    """
    cards = {folder: json.loads((folder / "model.json").read_text()) for folder in models}
    marks = []
    table = read_slide_tables(slide_tables)
    for row in table[table["status"] == "ready"].to_dict("records"):
        attributes = open_store(Path(row["store"])).attributes
        for folder, card in cards.items():
            if (attributes.encoder_weights_sha256 or "") != card["encoder_weights_sha256"]:  # "": imported, not known
                raise InferenceError(f"{folder} was not trained on the features in {row['store']}: train it anew")
        marks.append(slide_mark(attributes.source))
    known = {name: settings[name] for name in ("tiling", "reading", "encoder")}
    pipeline = Pipeline(**known, known_slides=sorted(marks), runs=[folder.name for folder in models])
    with replace_when_whole(output) as part:
        part.write_text(json.dumps(asdict(pipeline), indent=2) + "\n")
