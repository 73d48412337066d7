"""The weights of an encoder: read from a file, matched with the model key by key, and named by their digest.

Checkpoints wrap the same weights in many ways. What is taken off is said in the log; what is left must be exactly the
model's keys and shapes, or the checkpoint is refused.
"""

import hashlib
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preprocessing.errors import SettingsError

WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher", "student")  # in this order: the teacher is the better
PREFIXES = tuple(
    outer + inner
    for outer in ("", "module.", "_orig_mod.")  # DataParallel, torch.compile
    for inner in ("", "teacher.backbone.", "teacher.", "student.backbone.", "backbone.", "encoder.", "model.")
)
HEADS = ("head", "fc", "classifier")  # what num_classes=0 leaves away

State = Mapping[str, torch.Tensor]

log = logging.getLogger(__name__)


def load_weights(model: nn.Module, path: Path, where: str) -> None:
    """Load the state dict of `path` into the model, cast to the model's precision; `where` names the model in errors.

    Raises SettingsError, listing the keys, where they are not the model's, and for a file that holds more than tensors.
    """
    state, wrappers = unwrap(read_state(path))
    expected = model.state_dict()
    found, prefix = strip_prefix(state, expected)
    heads = sorted(key for key in found.keys() - expected.keys() if key.split(".")[0] in HEADS)
    found = {key: tensor for key, tensor in found.items() if key not in heads}
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(k for k in expected.keys() & found.keys() if expected[k].shape != found[k].shape),
    }
    if any(problems.values()):
        lists = "; ".join(f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in problems.items() if keys)
        raise SettingsError(
            f"{path} does not hold the weights of {where}: {lists}. Give the state dict of the timm model with"
            " num_classes=0, or name the model it is of"
        )
    model.load_state_dict(found)  # copies into the model's float32 tensors, so fp16 files are cast
    beside = sorted({key.split(".")[0] for key in state if prefix and not key.startswith(prefix)})
    for what, taken_off in {"wrapper": wrappers, "prefix": [prefix] if prefix else [], "head": heads,
                            "what stands beside that prefix": beside}.items():  # fmt: skip
        if taken_off:
            log.info("%s: took off the %s %s", path, what, ", ".join(taken_off))


def read_state(path: Path) -> Any:
    """What a .safetensors or a torch file holds. Never unpickles objects: a checkpoint could run any code."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise SettingsError(
            f"{path} is no torch file of tensors alone ({error or type(error).__name__}). If it holds a whole model or"
            " the settings of its training, and you trust its source, save the state dict alone as .safetensors"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise SettingsError(f"{path} holds a {type(checkpoint).__name__}, expected a state dict: names and tensors")
    return checkpoint


def unwrap(checkpoint: Any) -> tuple[State, list[str]]:
    """The state dict within a checkpoint, and the keys that were opened to find it."""
    opened = []
    while key := next((k for k in WRAPPERS if isinstance(checkpoint.get(k), Mapping)), None):
        checkpoint = checkpoint[key]
        opened.append(key)
    return {key: value for key, value in checkpoint.items() if isinstance(value, torch.Tensor)}, opened


def strip_prefix(state: State, expected: State) -> tuple[State, str]:
    """The entries below the prefix that leaves most of the expected keys, without it; and that prefix."""

    def below(prefix: str) -> State:
        return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}

    prefix = max(PREFIXES, key=lambda prefix: len(below(prefix).keys() & expected.keys()))  # the first of equals
    return below(prefix), prefix


def sha256_of_state(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
