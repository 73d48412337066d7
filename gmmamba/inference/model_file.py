"""Trained models with the pipeline that leads to them.

`load_ensemble` reads an experiment's folder (all folds and seeds), one run's folder, or a model file.

A model file is all of it in one safetensors file, nothing pickled (`export_model`): the tensors of each member as
`fold0_seed0/<parameter>`, the bytes of the encoder's weight file as `encoder_weights` if they were asked for, and in
the metadata, under "gmmamba", the JSON of `card`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from gmmamba import __version__
from gmmamba.cohort import SAFE_ID
from gmmamba.inference.pipeline import InferenceError, Pipeline
from gmmamba.models import create_model
from gmmamba.models.bag import MILModel
from slidestore.atomic import replace_when_whole
from slidestore.settings import from_dict, own_function

FORMAT = 1
CARD = (
    "pipeline", "experiment", "dataset", "classes", "encoder", "encoder_weights_sha256", "in_dim", "members", "sha256",
)  # fmt: skip
ENCODER_BYTES = "encoder_weights"


@dataclass(frozen=True)
class Member:
    """One trained model. `sha256` is of its tensors, the same in a run's folder and in a model file."""

    fold: int
    seed: int
    sha256: str
    model: MILModel

    @property
    def name(self) -> str:
        return f"fold{self.fold}_seed{self.seed}"


@dataclass(frozen=True)
class Ensemble:
    """Models of one experiment, in evaluation mode on the CPU, and the way of a slide to them.

    card: what they share: `experiment` as in model.json, `dataset`, `classes`, `encoder`, `encoder_weights_sha256`,
    `in_dim`, and the `members`, each with what its own model.json says. encoder_file: the bytes of the encoder's
    weights (safetensors), where the model file holds them.
    """

    path: Path
    card: dict[str, Any]
    pipeline: Pipeline
    members: list[Member]
    encoder_file: bytes | None = None

    @property
    def classes(self) -> list[str]:
        return list(self.card["classes"])

    @property
    def grouping(self) -> str | None:
        return self.card["experiment"]["grouping"]


def load_ensemble(path: Path, only: Sequence[str] | None = None, own_code: bool = False) -> Ensemble:
    """The models in an experiment's or a run's folder, or in a model file; `only` those of these names (fold0_seed0).

    own_code: a model file, which may be from anybody, may name a Python file of this machine as its encoder.
    InferenceError for what is none of these, and for models that are not of one experiment.
    """
    if path.is_file():
        return _from_file(path, only, own_code)
    if not path.is_dir():
        raise InferenceError(f"{path} does not exist: give results/DATASET/EXPERIMENT, a run's folder in it, or a file")
    runs = run_folders(path)
    if only and runs:
        _check_names(path, [run.name for run in runs], only)
        runs = [run for run in runs if run.name in only]
    if not runs:
        raise InferenceError(f"{path} holds no trained model (fold0_seed0/model.json): train the experiment first")
    home = path if runs != [path] else path.parent
    try:
        pipeline = from_dict(Pipeline, json.loads((home / "pipeline.json").read_text()), str(home / "pipeline.json"))
    except FileNotFoundError as error:
        raise InferenceError(
            f"{home / 'pipeline.json'} does not exist, so how slides become features is not known: let Snakemake write"
            f" it (snakemake {home / 'pipeline.json'})"
        ) from error
    cards = [json.loads((run / "model.json").read_text()) for run in runs]
    own = ("fold", "seed", "best_epoch", "validation_score", "gmmamba_version", "torch_version", "device")
    members = []
    for run, card in zip(runs, cards, strict=True):
        differing = [key for key in cards[0] if key not in (*own, "epochs_run") and card.get(key) != cards[0][key]]
        if differing:
            raise InferenceError(
                f"{run} and {runs[0]} differ in {differing[0]}: they make no ensemble; train both anew"
            )
        members.append(_member(card, card["fold"], card["seed"], load_file(run / "model.safetensors"), run))
    shared = {key: value for key, value in cards[0].items() if key not in (*own, "epochs_run")}
    details = [{key: card[key] for key in own} for card in cards]
    return Ensemble(path, {"dataset": home.parent.name, **shared, "members": details}, pipeline, members)


def _check_names(path: Path, there: Sequence[str], only: Sequence[str]) -> None:
    if missing := [name for name in only if name not in there]:
        raise InferenceError(f"{path} has no {missing[0]}, only {', '.join(there)}")


def run_folders(folder: Path) -> list[Path]:
    """The runs of an experiment in the order of fold and seed, as numbers; of a run's own folder that one.

    Runs that its pipeline.json does not name are left from a configuration that had more folds or seeds.
    """
    if (folder / "model.json").is_file():
        return [folder]
    found = [file.parent for file in folder.glob("fold*_seed*/model.json")]
    record = folder / "pipeline.json"
    if record.is_file() and (current := json.loads(record.read_text()).get("runs")):
        found = [run for run in found if run.name in current]
    return sorted(found, key=lambda run: [int(part.strip("foldse")) for part in run.name.split("_")])


def _member(card: Mapping[str, Any], fold: int, seed: int, state: dict[str, Tensor], where: Path) -> Member:
    experiment = card["experiment"]
    model = create_model(experiment["method"], card["in_dim"], len(card["classes"]), **experiment["model"])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InferenceError(
            f"{where}: the weights are not those of the model it describes ({' '.join(str(error).split())})"
        ) from error
    return Member(fold, seed, state_digest(state), model.eval())


def state_digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def export_model(ensemble: Ensemble, output: Path, with_encoder: bool = False) -> None:
    """Write the ensemble as one model file, `with_encoder` with the encoder's weights, if they are a safetensors file.

    The settings of the encoder then name that file, without its folder.
    """
    tensors = {
        f"{member.name}/{name}": tensor.contiguous()
        for member in ensemble.members
        for name, tensor in member.model.state_dict().items()
    }
    pipeline = asdict(ensemble.pipeline)
    if with_encoder:
        if ensemble.encoder_file is not None:
            content = ensemble.encoder_file
        else:
            content = _encoder_bytes(ensemble)
            pipeline["encoder"] = {**pipeline["encoder"], "weights": Path(pipeline["encoder"]["weights"]).name}
        tensors[ENCODER_BYTES] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    card = {
        "format": FORMAT,
        **ensemble.card,
        "pipeline": pipeline,
        "sha256": {member.name: member.sha256 for member in ensemble.members},
        "exported_by": f"gmmamba {__version__}",
    }
    with replace_when_whole(output) as part:
        part.write_bytes(save(tensors, {"gmmamba": json.dumps(card)}))  # save_file's would be its owner's alone


def _encoder_bytes(ensemble: Ensemble) -> bytes:
    encoder = ensemble.pipeline.encoder or {"weights": "unknown"}
    path = Path(encoder["weights"])
    if encoder["weights"] in ("pretrained", "random", "unknown"):
        raise InferenceError(
            f"the encoder's weights are {encoder['weights']}, no file that could go into the model file: leave out"
            " --with-encoder; who loads it gets them as training did"
        )
    if path.suffix != ".safetensors":
        raise InferenceError(
            f"{path} is no .safetensors file, and nothing pickled goes into a model file: leave out --with-encoder, and"
            " hand the file over beside it (predict --encoder-weights)"
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != ensemble.card["encoder_weights_sha256"]:
        raise InferenceError(f"{path} is not the file that the models' features are from: put that one in its place")
    return content


def _from_file(path: Path, only: Sequence[str] | None, own_code: bool) -> Ensemble:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except safetensors.SafetensorError as error:
        raise InferenceError(f"{path} is no whole safetensors file ({error}): export the model again") from error
    if "gmmamba" not in metadata:
        raise InferenceError(
            f"{path} does not describe itself: it is no file that `gmmamba export-model` wrote; of a run, give the"
            " folder instead"
        )
    card, pipeline = _described(path, metadata["gmmamba"], own_code)
    encoder = tensors.pop(ENCODER_BYTES, None)
    names = [f"fold{member['fold']}_seed{member['seed']}" for member in card["members"]]
    if only:
        _check_names(path, names, only)
    card["members"] = [member for member, name in zip(card["members"], names, strict=True) if name in (only or names)]
    members = []
    for member in card["members"]:
        prefix = f"fold{member['fold']}_seed{member['seed']}/"
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        members.append(_member(card, member["fold"], member["seed"], state, path))
        if members[-1].sha256 != card["sha256"][members[-1].name]:
            raise InferenceError(f"{path}: the weights of {members[-1].name} are not those exported: export it again")
    return Ensemble(path, card, pipeline, members, None if encoder is None else encoder.numpy().tobytes())


def _described(path: Path, text: str, own_code: bool) -> tuple[dict[str, Any], Pipeline]:
    """The card and the pipeline of a model file. It may be from anybody: what it says must not reach out of --output,
    nor run code of this machine. Raises InferenceError."""
    try:
        card = json.loads(text)
    except ValueError as error:
        raise InferenceError(f"{path} describes itself in what is no JSON ({error}): export the model again") from error
    if not isinstance(card, dict) or "format" not in card:
        raise InferenceError(f"{path} does not say of which format it is: export the model again")
    if card["format"] != FORMAT:
        raise InferenceError(f"{path} is of format {card['format']}, this program reads {FORMAT}: export it again")
    if missing := [key for key in CARD if key not in card]:
        raise InferenceError(f"{path} says nothing of {', '.join(missing)}: export the model again")
    try:
        pipeline = from_dict(Pipeline, card.pop("pipeline"), str(path))
    except (ValueError, TypeError) as error:
        raise InferenceError(f"{path}: {error}: export the model again") from error
    encoder = pipeline.encoder or {}
    for name in (card["encoder"], encoder.get("name", card["encoder"])):
        if not SAFE_ID.fullmatch(str(name)):
            raise InferenceError(
                f"{path}: the encoder's name {name!r}, which becomes a folder's, must be made of letters, digits, '.',"
                " '_' and '-'"
            )
    if not own_code and own_function(str(encoder.get("model", ""))):
        raise InferenceError(
            f"{path} takes its encoder from a Python file, {encoder['model']}, which would run here: look into that"
            " file, and allow it with --own-code"
        )
    return card, pipeline
