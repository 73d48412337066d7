"""The commands record-pipeline, export-model and predict: from paths and options to the functions that do the work."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gmmamba.inference.model_file import load_ensemble
from gmmamba.inference.pipeline import InferenceError
from gmmamba.inference.predict import predict_slides
from gmmamba.inference.preparation import Preparation
from gmmamba.new_slides import list_slides
from gmmamba.prediction import choose_device
from slidestore.atomic import replace_when_whole


def predict(
    model: Path,
    source: Path,
    output: Path,
    runs: Sequence[str] | None = None,
    like: str | None = None,
    mpp: float | None = None,
    encoder_weights: Path | None = None,
    prepared: bool = False,
    threads: int | None = None,
    quick: bool = False,
    top: int = 8,
    reader: str | None = None,
    own_code: bool = False,
) -> tuple[str, bool]:
    """Predict the slides of `source` and write `output`; what to say of it, and whether any slide could be predicted.

    runs: of an experiment these only. like: the cohort whose tiling to follow. mpp: of slides whose sheet gives none,
    µm per pixel of level 0.
    encoder_weights: the file of the encoder's weights, where it is not at the place that training had it. prepared:
    tiles and features of the slides are in `output` already. quick: attention is all that is shown.
    reader: instead of the training's (`reading.reader`), for a machine that has not what that needs. own_code: a model
    file may name Python files of this machine, which are then run.
    threads: readers of slides, and CPU threads of the networks; None is what encoding jobs have, 8 with a GPU, else 1.
    """
    if prepared and reader is not None:
        raise InferenceError("--reader says how slides are read, with --prepared none is: leave out one of the two")
    ensemble = load_ensemble(model, runs, own_code)
    slides = list_slides(source, mpp)
    tiling = ensemble.pipeline.tiling_like(like, str(model))
    sha = ensemble.card["encoder_weights_sha256"]
    encoder = dict(ensemble.pipeline.encoder or {})
    if not prepared:
        encoder = {**encoder, "weights": _weights(encoder, sha, output, encoder_weights, ensemble.encoder_file)}
    on_gpu = choose_device().type == "cuda"
    reading = dict(ensemble.pipeline.reading) | ({} if reader is None else {"reader": reader})
    if not prepared and reading.get("reader") == "nvjpeg" and not on_gpu:
        raise InferenceError(
            f"{model} was trained with reading.reader nvjpeg, which needs an NVIDIA GPU: give --reader scaled or exact,"
            " whose pixels are nearly the same"
        )
    threads = threads or (8 if on_gpu else 1)
    preparation = Preparation(output, tiling, reading, encoder, sha, threads)
    table = predict_slides(ensemble, slides, preparation, prepared, quick, top)
    predicted = table[table["status"] == "predicted"]
    lines = [f"{len(predicted)} of {len(table)} slides predicted by {len(ensemble.members)} models: {output}"]
    lines += [f"  {row.slide_id}: {row.predicted}" for row in predicted.itertuples()]
    if not predicted.empty:
        lines.append(f"Heat maps and files for QuPath and napari: {output / 'slides'}")
    lines += [f"  {row.slide_id}: failed: {row.reason}" for row in table[table["status"] == "failed"].itertuples()]
    if known := list(predicted.loc[predicted["in_training"] == "yes", "slide_id"]):
        lines.append(f"Part of the dataset that the models are from, so no independent prediction: {', '.join(known)}")
    return "\n".join(lines), not predicted.empty


def _weights(encoder: Mapping[str, Any], sha256: str, output: Path, given: Path | None, content: bytes | None) -> str:
    """What to load the encoder's weights from: their setting, or a file whose digest is checked here."""
    named = str(encoder["weights"])
    if given is None and content is not None:
        path = output / "encoder.safetensors"
        with replace_when_whole(path) as part:
            part.write_bytes(content)
    elif given is None and named in ("pretrained", "random"):
        return named
    else:
        path = given or Path(named)
    if not path.is_file():
        raise InferenceError(f"the encoder's weights {path} are not there: name their file with --encoder-weights")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InferenceError(
            f"{path} has other weights ({found[:12]}) than the encoder that the models were trained with"
            f" ({sha256[:12]}): give that one's file with --encoder-weights"
        )
    return str(path)
