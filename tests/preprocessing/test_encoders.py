"""Encoders by name: their weights, their identity, the patches that they take."""

import hashlib
import logging
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from preprocessing.__main__ import main
from preprocessing.encoders import PRESETS, Encoder, EncoderSettings
from slidestore.warm_start import OWNER
from tests.docs import code_blocks

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
    wrong = state() | {"neck.extra": torch.zeros(1), "conv1.0.weight": torch.zeros(1)}
    del wrong["bn1.bias"]
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w.safetensors does not hold the weights of test_resnet") as error:
        Encoder(replace(RANDOM, weights=str(tmp_path / "w.safetensors")), 64)
    for part in ("1 missing: bn1.bias", "1 unexpected: neck.extra", "1 of another shape: conv1.0.weight"):
        assert part in str(error.value)


State = dict[str, torch.Tensor]


def below(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


CHECKPOINTS: dict[str, tuple[Callable[[State], Any], str]] = {  # how a model is saved, and what the log says of it
    "timm, with its head": (lambda s: s | {"fc.weight": torch.zeros(9, 9)}, "took off the head fc.weight"),
    "DataParallel": (lambda s: {"epoch": 3, "state_dict": below("module.", s)}, "wrapper state_dict"),
    "DINO": (
        lambda s: {"student": below("module.backbone.", zeros(s)), "epoch": 3,
                   "teacher": below("backbone.", s) | {"head.mlp.0.weight": torch.zeros(4, 4)}},
        "took off what stands beside that prefix head",
    ),
    "DINOv2": (lambda s: {"model": below("student.backbone.", zeros(s)) | below("teacher.backbone.", s)},
               "prefix teacher.backbone."),
    "MoCo": (lambda s: below("encoder.", s), "prefix encoder."),
}  # fmt: skip


def zeros(state: State) -> State:
    return {key: torch.zeros_like(value) for key, value in state.items()}


@pytest.mark.parametrize("form", CHECKPOINTS)
def test_wrappers_and_prefixes_are_taken_off_and_named(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    wrap, said = CHECKPOINTS[form]
    torch.save(wrap(state()), tmp_path / "checkpoint.pth")
    with caplog.at_level(logging.INFO):
        encoder = Encoder(replace(RANDOM, weights=str(tmp_path / "checkpoint.pth")), 64)
    assert said in caplog.text.replace("the what", "what")
    for name, tensor in state().items():
        torch.testing.assert_close(encoder.model.state_dict()[name], tensor, rtol=0, atol=0)


def test_after_a_prefix_the_keys_are_the_model_s_or_the_file_is_refused(tmp_path: Path) -> None:
    wrong = below("module.", state())
    del wrong["module.bn1.bias"]
    torch.save({"state_dict": wrong | {"module.neck.bias": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"1 missing: bn1.bias; 1 unexpected: neck.bias\. Give"):
        Encoder(replace(RANDOM, weights=str(tmp_path / "w.pth")), 64)


@pytest.mark.parametrize("content", [{"args": Namespace(a=1), "model": {}}, [torch.zeros(1)]])
def test_a_file_of_more_than_tensors_is_never_unpickled(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth (is no torch file of tensors alone|holds a list)"):
        Encoder(replace(RANDOM, weights=str(tmp_path / "w.pth")), 64)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_an_architecture_with_its_transform(tmp_path: Path, name: str) -> None:
    encoder = Encoder(EncoderSettings("p", name, "random"), 224)
    bare = timm.create_model(PRESETS[name].architecture, num_classes=0)
    assert encoder.features == bare.num_features
    torch.testing.assert_close(encoder.mean.flatten() / 255, torch.tensor(PRESETS[name].mean))
    torch.testing.assert_close(encoder.std.flatten() / 255, torch.tensor(PRESETS[name].std))
    torch.save(bare.state_dict(), tmp_path / "w.pth")
    Encoder(EncoderSettings("p", name, str(tmp_path / "w.pth")), 224)


def test_the_config_s_transform_wins() -> None:
    encoder = Encoder(replace(RANDOM, mean=[0.1, 0.2, 0.3], std=[1, 1, 0.5]), 64)
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor([25.5, 51, 76.5]))
    torch.testing.assert_close(encoder.std.flatten(), torch.tensor([255, 255, 127.5]))


def test_weights_out_of_reach_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"lunit.* cannot be fetched .* set encoders\.lunit\.weights to that file"):
        Encoder(EncoderSettings("lunit", "lunit_vit_small_patch16_dino", "pretrained"), 224)


def test_the_encoders_of_the_docs(tmp_path: Path) -> None:
    """The file that docs/encoders.md shows is an encoder; without a network it has random weights, or a file's."""
    (tmp_path / "my_encoders.py").write_text(code_blocks("encoders.md", "python")[0])
    own = EncoderSettings("uni", f"{tmp_path}/my_encoders.py:small_resnet", "random")
    encoder = Encoder(own, 64)
    patches = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert encoder(patches).shape == (2, encoder.features)
    torch.save(Encoder(replace(own, seed=3), 64).model.state_dict(), tmp_path / "w.pth")
    loaded = Encoder(replace(own, weights=str(tmp_path / "w.pth")), 64)
    assert not torch.equal(loaded(patches), encoder(patches))
    with pytest.raises(ValueError, match=r"encoder 'uni': .*my_encoders.py has no function 'uni2'"):
        Encoder(replace(own, model=f"{tmp_path}/my_encoders.py:uni2"), 64)
    with pytest.raises(ValueError, match=r"makes \(1, \d+, \d+, \d+\) of one patch, expected \(1, D\)"):
        Encoder(replace(RANDOM, kwargs={"global_pool": ""}), 64)


def test_a_model_of_fixed_size_names_both_sizes() -> None:
    vit = EncoderSettings(name="tiny-vit", model="test_vit", weights="random")
    Encoder(vit, 160)
    with pytest.raises(ValueError, match=r"'tiny-vit' \(test_vit\) takes patches of 160 px, .* of 224 px"):
        Encoder(vit, 224)
    assert Encoder(replace(vit, kwargs={"dynamic_img_size": True}), 224).features == Encoder(vit, 160).features


def test_settings_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match=r"timm has no model 'resnet81' \(did you mean '.+'\?\); see timm"):
        Encoder(replace(RANDOM, model="resnet81"), 64)
    with pytest.raises(ValueError, match="precision is 'fp8', expected fp32 or bf16"):
        Encoder(replace(RANDOM, precision="fp8"), 64)


def test_the_command_line_says_what_does_not_fit_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cohort of a thousand slides fails a thousand times: no traceback stands between a person and the reason."""
    (tmp_path / "jobs.json").write_text("[]")

    def no_model(*_: Any) -> None:
        Encoder(replace(RANDOM, model="resnet81"), 64)

    monkeypatch.delenv(OWNER, raising=False)
    monkeypatch.setattr("preprocessing.encode.encode_slides", no_model)
    monkeypatch.setattr("sys.argv", ["preprocessing", "encode", "--jobs", str(tmp_path / "jobs.json"), "--settings",
                                     '{"name": "tiny", "model": "resnet81", "weights": "random"}'])  # fmt: skip
    assert main() == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("preprocessing: encoder 'tiny': timm has no model 'resnet81' (did you mean")


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
