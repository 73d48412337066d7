"""Patch encoders: any timm model by name, with its weights and its image transform.

An encoder takes uint8 RGB patches and gives one feature vector a patch; the transform is the mean and sd of timm's own
config for the model, applied on the device.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn


@dataclass(frozen=True)
class EncoderSettings:
    """One encoder of the config."""

    name: str  # what the stores call it
    model: str  # timm's name, such as "resnet18" or "vit_small_patch16_224"
    weights: str  # "pretrained" (timm fetches them), "random", or the path of a .safetensors or torch state dict
    seed: int = 0  # of random weights
    batch_size: int = 64
    precision: str = "fp32"  # or "bf16": autocast


class Encoder(nn.Module):
    """(B, 3, P, P) uint8 RGB patches -> (B, D) features, in the precision of the settings.

    `weights_sha256` is of the weight file, or of the state dict's bytes where there is no file.
    """

    mean: torch.Tensor
    sd: torch.Tensor

    def __init__(self, settings: EncoderSettings, patch_px: int) -> None:
        """Raises ValueError for an unknown model, weights that are not the model's, or a patch size it cannot take."""
        super().__init__()
        if settings.precision not in ("fp32", "bf16"):
            raise ValueError(f"encoder {settings.name!r}: precision is {settings.precision!r}, expected fp32 or bf16")
        if not timm.is_model(settings.model):
            raise ValueError(f"encoder {settings.name!r}: timm has no model {settings.model!r}; see timm.list_models()")
        self.settings = settings
        # The seed decides random weights; fork_rng keeps it from leaking into the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model: Any = timm.create_model(settings.model, pretrained=settings.weights == "pretrained", num_classes=0)
        if settings.weights in ("pretrained", "random"):
            self.weights_sha256 = sha256_of_state(model)
        else:
            load_weights(model, Path(settings.weights), settings)
            self.weights_sha256 = sha256_of_file(Path(settings.weights))

        data = timm.data.resolve_model_data_config(model)
        input_px = data["input_size"][-1]
        if model.default_cfg.get("fixed_input_size") and patch_px != input_px:
            raise ValueError(
                f"encoder {settings.name!r} ({settings.model}) takes patches of {input_px} px, the slide is tiled in"
                f" patches of {patch_px} px: set patch_px to {input_px}, or choose a model of that size"
            )
        for name, values in {"mean": data["mean"], "sd": data["std"]}.items():  # of RGB in 0-1; patches are 0-255
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        # Patches come as (B, P, P, 3): the layout in which convolutions then need no copy, and are faster.
        self.model = model.to(memory_format=torch.channels_last)
        self.features = int(model.num_features)
        self.eval().requires_grad_(False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        images = (patches.to(torch.float32) - self.mean) / self.sd
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(patches.device.type, dtype=torch.bfloat16, enabled=bf16):
            features: torch.Tensor = self.model(images)
        return features


def load_weights(model: nn.Module, path: Path, settings: EncoderSettings) -> None:
    """Load a state dict from `path`, cast to the model's precision; ValueError where its keys are not the model's."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    expected = model.state_dict()
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": sorted(k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape),
    }
    if any(problems.values()):
        lists = "; ".join(f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(
            f"{path} does not hold the weights of {settings.model} (encoder {settings.name!r}): {lists}. Give the state"
            " dict of the timm model with num_classes=0, or name the model it is of"
        )
    model.load_state_dict(state)  # copies into the model's float32 tensors, so fp16 files are cast


def sha256_of_state(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
