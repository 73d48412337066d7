"""Patch encoders: any timm model by name, a preset, or a function of the user's own; with weights and image transform.

An encoder takes uint8 RGB patches and gives one feature vector a patch. The transform is a mean and a standard
deviation a channel, applied on the device: those of the config, else of the preset or function, else timm's own.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from preprocessing.errors import SettingsError
from preprocessing.weights import load_weights, sha256_of_file, sha256_of_state
from slidestore.settings import nearest, own_function


@dataclass(frozen=True)
class EncoderSettings:
    """One encoder of the config."""

    name: str  # what the stores call it
    model: str  # a preset, a timm name such as "resnet18" or "hf-hub:owner/model", or "file.py:function"
    weights: str  # "pretrained" (timm fetches them), "random", or the path of a .safetensors or torch state dict
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)  # for timm.create_model, or the function
    mean: Sequence[float] | None = None  # of RGB in 0-1, instead of the model's own
    std: Sequence[float] | None = None
    seed: int = 0  # of random weights
    batch_size: int = 64
    precision: str = "fp32"  # or "bf16": autocast


@dataclass(frozen=True)
class Preset:
    """A published encoder: its architecture in timm, where timm finds its weights, and its transform (RGB in 0-1)."""

    architecture: str
    hub: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


PRESETS = {
    # Kang et al. 2023, github.com/lunit-io/benchmark-ssl-pathology
    "lunit_vit_small_patch16_dino": Preset(
        "vit_small_patch16_224",
        "hf-hub:1aurent/vit_small_patch16_224.lunit_dino",
        (0.70322989, 0.53606487, 0.66096631),
        (0.21716536, 0.26081574, 0.20723464),
    ),
    # kaiko.ai et al. 2024, github.com/kaiko-ai/towards_large_pathology_fms
    "kaiko_vit_small_patch16_dino": Preset(
        "vit_small_patch16_224",
        "hf-hub:1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms",
        (0.5, 0.5, 0.5),
        (0.5, 0.5, 0.5),
    ),
}


class Encoder(nn.Module):
    """(B, 3, P, P) uint8 RGB patches -> (B, D) features, in the precision of the settings.

    `weights_sha256` is of the weight file, or of the state dict's bytes where there is no file.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, settings: EncoderSettings, patch_px: int) -> None:
        """Raises SettingsError for an unknown model, weights that are not the model's, weights that cannot be fetched,
        a model that gives no feature vector, or a patch size it cannot take."""
        super().__init__()
        where = f"encoder {settings.name!r}"
        if settings.precision not in ("fp32", "bf16"):
            raise SettingsError(f"{where}: precision is {settings.precision!r}, expected fp32 or bf16")
        # The seed decides random weights; fork_rng keeps it from leaking into the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model, mean, std = create(settings)
        check_patch_size(model, settings, patch_px)
        if settings.weights in ("pretrained", "random"):
            self.weights_sha256 = sha256_of_state(model)
        else:
            load_weights(model, Path(settings.weights), f"{settings.model} ({where})")
            self.weights_sha256 = sha256_of_file(Path(settings.weights))
        for name, values in {"mean": settings.mean or mean, "std": settings.std or std}.items():
            if len(values) != 3:
                raise SettingsError(f"{where}: {name} is {list(values)}, expected three numbers, of R, G and B in 0-1")
            # patches are 0-255
            self.register_buffer(
                name, 255 * torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1), persistent=False
            )
        self.settings, self.model = settings, model
        self.eval().requires_grad_(False)
        with torch.inference_mode():
            shape = tuple(self(torch.zeros(1, 3, patch_px, patch_px, dtype=torch.uint8)).shape)
        if len(shape) != 2:
            raise SettingsError(f"{where}: {settings.model} makes {shape} of one patch, expected (1, D): one vector")
        self.features = shape[1]

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        images = (patches.to(torch.float32) - self.mean) / self.std
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(patches.device.type, dtype=torch.bfloat16, enabled=bf16):
            features: torch.Tensor = self.model(images)
        return features


def create(settings: EncoderSettings) -> tuple[Any, Sequence[float], Sequence[float]]:
    """The model, with pretrained or with random weights, and its mean and std of RGB in 0-1.

    Raises SettingsError for an unknown model, and for weights that cannot be fetched.
    """
    where, pretrained = f"encoder {settings.name!r}", settings.weights == "pretrained"
    own = own_function(settings.model)
    preset = PRESETS.get(settings.model)
    name = settings.model if preset is None else preset.hub if pretrained else preset.architecture
    if not own and ":" not in name and not timm.is_model(name):
        hint = nearest(name, [*PRESETS, *timm.list_models()], otherwise="")
        raise SettingsError(
            f"{where}: timm has no model {name!r}{hint and f' ({hint})'}; see timm.list_models(). "
            f"Presets: {', '.join(PRESETS)}; your own: file.py:function"
        )
    try:
        if own:
            model, mean, std = function_of(*own, where)(pretrained, **settings.kwargs)
            return model, mean, std
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **settings.kwargs)
    except OSError as error:  # whatever huggingface_hub raises: no network, no such repository, no access to it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingsError(
            f"{where}: {name} cannot be fetched ({reason}). Either fetch it once where there is a network"
            " (timm keeps it in HF_HOME; a gated model needs HF_TOKEN), or download its weights and set"
            f" encoders.{settings.name}.weights to that file and .model to a preset or to timm's name of the"
            " architecture, such as vit_small_patch16_224"
        ) from error
    data = timm.data.resolve_model_data_config(model)  # type: ignore[attr-defined]
    return (model, data["mean"], data["std"]) if preset is None else (model, preset.mean, preset.std)


def function_of(path: Path, name: str, where: str) -> Callable[..., tuple[nn.Module, Sequence[float], Sequence[float]]]:
    """The function `name` of a Python file. SettingsError where there is no such file or function."""
    if not path.is_file():
        raise SettingsError(f"{where}: {path} does not exist (a path relative to the working directory)")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(function := getattr(module, name, None)):
        raise SettingsError(f"{where}: {path} has no function {name!r}")
    return function


def check_patch_size(model: Any, settings: EncoderSettings, patch_px: int) -> None:
    """SettingsError where the model takes patches of one size, and this is not it."""
    cfg = getattr(model, "default_cfg", {})  # timm's models have one
    if settings.kwargs.get("dynamic_img_size") or not cfg.get("fixed_input_size"):
        return
    input_px = settings.kwargs.get("img_size", cfg["input_size"][-1])
    if patch_px != input_px:
        raise SettingsError(
            f"encoder {settings.name!r} ({settings.model}) takes patches of {input_px} px, the slide is tiled in"
            f" patches of {patch_px} px: set patch_px to {input_px}, choose a model of that size, or, for a vision"
            " transformer, set kwargs: {dynamic_img_size: true}"
        )
