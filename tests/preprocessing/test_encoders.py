"""Encoders by name: their weights, their identity, the patches that they take."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from preprocessing.encoders import Encoder, EncoderSettings

RANDOM = EncoderSettings(name="tiny", model="test_resnet", weights="random")


def state() -> dict[str, torch.Tensor]:
    return Encoder(replace(RANDOM, seed=7), 64).model.state_dict()


def test_random_weights_follow_the_seed_and_nothing_else() -> None:
    first = Encoder(RANDOM, 64)
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    assert Encoder(RANDOM, 64).weights_sha256 == first.weights_sha256
    assert torch.equal(torch.random.get_rng_state(), before)
    assert Encoder(replace(RANDOM, seed=1), 64).weights_sha256 != first.weights_sha256


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_of_a_file_are_loaded_and_cast(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    path = tmp_path / f"weights{suffix}"
    fp32 = state()
    saved = {k: v.to(dtype) if v.is_floating_point() else v for k, v in fp32.items()}
    save_file(saved, path) if suffix == ".safetensors" else torch.save(saved, path)
    encoder = Encoder(replace(RANDOM, weights=str(path)), 64)
    assert encoder.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for name, tensor in encoder.model.state_dict().items():
        assert tensor.dtype == fp32[name].dtype
        torch.testing.assert_close(tensor, saved[name].to(tensor.dtype), rtol=0, atol=0)


def test_weights_of_another_model_are_refused_listing_the_keys(tmp_path: Path) -> None:
    wrong = state() | {"head.extra": torch.zeros(1), "conv1.0.weight": torch.zeros(1)}
    del wrong["bn1.bias"]
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w.safetensors does not hold the weights of test_resnet") as error:
        Encoder(replace(RANDOM, weights=str(tmp_path / "w.safetensors")), 64)
    for part in ("1 missing: bn1.bias", "1 unexpected: head.extra", "1 of another shape: conv1.0.weight"):
        assert part in str(error.value)


def test_a_model_of_fixed_size_names_both_sizes() -> None:
    vit = EncoderSettings(name="tiny-vit", model="test_vit", weights="random")
    Encoder(vit, 160)
    with pytest.raises(ValueError, match=r"'tiny-vit' \(test_vit\) takes patches of 160 px, .* of 224 px"):
        Encoder(vit, 224)


def test_settings_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="encoder 'tiny': timm has no model 'resnet81'"):
        Encoder(replace(RANDOM, model="resnet81"), 64)
    with pytest.raises(ValueError, match="precision is 'fp8', expected fp32 or bf16"):
        Encoder(replace(RANDOM, precision="fp8"), 64)


def test_the_transform_is_timms_own() -> None:
    encoder = Encoder(replace(RANDOM, model="resnet18"), 64)
    patches = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, sd = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (patches / 255 - mean.view(3, 1, 1)) / sd.view(3, 1, 1)
    assert encoder.features == 512
    with torch.inference_mode():
        torch.testing.assert_close(encoder(patches), encoder.model(images), rtol=1e-4, atol=1e-5)


def test_bf16_is_close_to_fp32() -> None:
    patches = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        exact, rough = (Encoder(replace(RANDOM, precision=p), 64)(patches).float() for p in ("fp32", "bf16"))
    assert not torch.equal(exact, rough)
    assert (exact - rough).norm() < 0.03 * exact.norm()
