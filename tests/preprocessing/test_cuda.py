"""Encoding on a GPU gives what the CPU gives, and nvJPEG nearly what libjpeg-turbo gives.

On a machine without a GPU only the halves that a CPU can run: there `nvjpeg` decodes by libjpeg-turbo, the rest of its
reader is the same.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from preprocessing import encode, nvjpeg
from preprocessing.encode import SlideJob, encode_slides
from preprocessing.encoders import Encoder, EncoderSettings
from preprocessing.grid import whole_grid
from preprocessing.network import Network, make_repeatable, memory_for_pixels
from preprocessing.nvjpeg import TOLERANCE, NvjpegReader, check_nvjpeg
from preprocessing.patches import Opened, PatchReader, Reader, ReadingSettings, read_ahead
from preprocessing.slide import open_slide
from preprocessing.tile import Outputs, TilingSettings, tile_slide
from slidestore import open_store
from tests.slides import tissue, write_tiled

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
RESNET = EncoderSettings(name="resnet", model="resnet18", weights="random", batch_size=16)
VIT = replace(RESNET, name="vit", model="vit_tiny_patch16_224", kwargs={"img_size": 64})
IDENTITY = """
import torch
def identity(pretrained):
    return torch.nn.Flatten(1), (0, 0, 0), (1 / 255, 1 / 255, 1 / 255)
"""


def tiled(folder: Path, name: str, side: int = 1200, seed: int = 0) -> SlideJob:
    """A 40x slide that is tiled in patches of 64 px at 20x, and its job."""
    path = write_tiled(folder / f"{name}.svs", tissue(side, side, seed, dark=True), downsamples=(1, 4), aperio=True)
    outputs = Outputs(*(folder / f"{name}{end}" for end in (".npy", ".json", ".jpg", ".png", ".geojson")))
    record = tile_slide(path, name, "a", TilingSettings(patch_px=64, mpp=0.5), outputs)
    assert record["counts"]["kept"] > 20
    return SlideJob(path, outputs.coords, outputs.record, folder / f"{name}.zarr.zip")


def features_on(
    device: str, job: SlideJob, settings: EncoderSettings, monkeypatch: pytest.MonkeyPatch, reader: Reader = "exact"
) -> np.ndarray:
    monkeypatch.setattr(encode, "choose_device", lambda: torch.device(device))
    encode_slides([job], settings, ReadingSettings(reader), threads=3)
    return open_store(job.output).features.astype(np.float32)


@needs_gpu
@pytest.mark.parametrize("settings", [RESNET, VIT], ids=lambda settings: settings.name)
def test_features_are_those_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: EncoderSettings
) -> None:
    job = tiled(tmp_path, "a")
    cpu, gpu = (features_on(device, job, settings, monkeypatch) for device in ("cpu", "cuda"))
    assert np.abs(gpu - cpu).max() < 2e-3 * np.abs(cpu).max()  # a rounding to float16, no more
    bf16 = features_on("cuda", job, replace(settings, precision="bf16"), monkeypatch)
    assert 0 < np.abs(bf16 - cpu).max() < 0.05 * np.abs(cpu).max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reader", ["exact", pytest.param("nvjpeg", marks=needs_gpu)])
def test_many_slides_give_the_stores_of_each_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, reader: Reader
) -> None:
    if (device, reader) == ("cpu", "nvjpeg"):
        pytest.skip("nvjpeg is refused on the CPU")
    monkeypatch.setattr(encode, "choose_device", lambda: torch.device(device))
    jobs = [tiled(tmp_path, name, side, seed) for seed, (name, side) in enumerate([("a", 1000), ("b", 1300)])]
    together = [replace(job, output=tmp_path / "together" / job.output.name) for job in [*jobs, jobs[0]]]
    encode_slides(together, RESNET, ReadingSettings(reader), threads=3)
    for job in jobs:
        encode_slides([job], RESNET, ReadingSettings(reader))
        assert job.output.read_bytes() == (tmp_path / "together" / job.output.name).read_bytes()


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_features_belong_to_their_patches(tmp_path: Path, device: str, graph: bool) -> None:
    """A network that gives the patch itself, in batches of 3 with a rest, while more are copied and computed."""
    (tmp_path / "own.py").write_text(IDENTITY)
    settings = EncoderSettings("identity", f"{tmp_path}/own.py:identity", "random", batch_size=3)
    encoder = Encoder(settings, 16)
    computing = Network(encoder, 16, torch.device(device), graph)
    assert (computing.compute.__name__ == "replay") == (graph and device == "cuda")

    path = write_tiled(tmp_path / "a.svs", tissue(700, 700, dark=True), aperio=True)
    slide = open_slide(path, "S1", "a")
    coords = whole_grid((700, 700), 16)
    reader = PatchReader(slide, coords, 16, 0.25)
    expected = np.stack([reader.read(row) for row in range(len(coords))])
    found = torch.zeros((len(coords), encoder.features), dtype=torch.float16, device=device)
    opening = iter([lambda: Opened(PatchReader(slide, coords, 16, 0.25))])
    rows, at = [], 0
    for _, batch in read_ahead(opening, 3, 4, memory_for_pixels(torch.device(device))):
        if batch is not None:
            found[at : at + len(batch.rows)] = computing(batch.pixels)
            rows.append(batch.rows)
            at += len(batch.rows)
    assert at == len(coords)
    planes = found.cpu().numpy().reshape(-1, 3, 16, 16).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(planes, expected[np.concatenate(rows)])


@needs_gpu
@pytest.mark.parametrize("settings", [RESNET, VIT, replace(VIT, precision="bf16")], ids=lambda s: s.name + s.precision)
def test_a_cuda_graph_gives_the_same_bits(settings: EncoderSettings) -> None:
    make_repeatable(1)
    device = torch.device("cuda")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)
    replayed, eager = (Network(Encoder(settings, 64), 64, device, graph) for graph in (True, False))
    assert replayed.compute.__name__ == "replay"
    for images in (pixels, pixels[::-1].copy(), pixels[:5]):
        first = replayed(images).clone()
        assert torch.equal(first, eager(images))
        assert torch.equal(first, replayed(torch.from_numpy(images).to(device)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("mpp", "patch_px"), [(0.25, 64), (0.5, 112), (0.7, 64), (1.0, 64), (0.2, 64)])
def test_nvjpeg_is_nearly_exact(tmp_path: Path, device: str, mpp: float, patch_px: int) -> None:
    """Shrunk or not, over the edge, and enlarged; the CPU's libjpeg-turbo to a grey level of rounding."""
    path = write_tiled(tmp_path / "a.tif", tissue(1500, 1400, dark=True), tile=(240, 256), downsamples=(1, 4))
    slide = open_slide(path, "S1", "a", mpp=0.25)
    coords = np.concatenate([whole_grid((1500, 1400), patch_px * mpp / 0.25) // 4 * 4, [[1448, 1380], [1496, 4]]])
    exact = PatchReader(slide, coords, patch_px, mpp)
    reader = NvjpegReader(slide, coords, patch_px, mpp, device=torch.device(device))
    assert (reader.route, reader.warnings) == ("nvjpeg", [])
    seen = np.zeros(len(coords), bool)
    for batch in reader.batches(7, 3):
        seen[batch.rows] = True
        assert isinstance(batch.pixels, torch.Tensor)
        for row, pixels in zip(batch.rows.tolist(), batch.pixels.cpu().numpy(), strict=True):
            difference = np.abs(pixels.astype(int) - exact.read(row))
            assert difference.mean() < TOLERANCE
            assert device == "cuda" or difference.max() <= 1
    assert seen.all()


@pytest.mark.parametrize("device", DEVICES)
def test_between_pixels_nvjpeg_is_nearly_exact(tmp_path: Path, device: str) -> None:
    pytest.importorskip("numba", reason="the exact reader needs it between pixels")
    path = write_tiled(tmp_path / "a.tif", tissue(1500, 1400, dark=True), downsamples=(1, 4))
    slide = open_slide(path, "S1", "a", mpp=0.25)
    coords = whole_grid((1400, 1300), 64 * 1.31 / 0.25)
    exact = PatchReader(slide, coords, 64, 1.31)
    reader = NvjpegReader(slide, coords, 64, 1.31, device=torch.device(device))
    assert reader.route == "nvjpeg"
    for batch in reader.batches(16, 1):
        for row, pixels in zip(batch.rows.tolist(), batch.pixels.cpu().numpy(), strict=True):
            assert np.abs(pixels.astype(int) - exact.read(row)).mean() < (1 if device == "cpu" else TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
def test_with_nvjpeg_a_damaged_tile_costs_the_patches_it_touches(tmp_path: Path, device: str) -> None:
    path = write_tiled(tmp_path / "a.tif", tissue(1500, 1400, dark=True))
    slide = open_slide(path, "S1", "a", mpp=0.25)
    coords = whole_grid((1500, 1400), 100)
    reader = NvjpegReader(slide, coords, 100, 0.25, ReadingSettings("nvjpeg", 0.2), torch.device(device))
    with tifffile.TiffFile(path) as tif, path.open("r+b") as file:
        file.seek(tif.pages[0].dataoffsets[8])  # the third tile of the second row
        file.write(bytes(100))
    lost = np.concatenate([batch.damaged for batch in reader.batches(16, 2)])
    touching = (coords < [768, 512]).all(axis=1) & (coords + 100 > [512, 256]).all(axis=1)
    assert sorted(lost.tolist()) == np.flatnonzero(touching).tolist()


def test_what_nvjpeg_cannot_do_is_read_as_by_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_slide(write_tiled(tmp_path / "a.tif", tissue(600, 600)), "S1", "a", mpp=0.25)
    coords, cpu = whole_grid((600, 600), 100), torch.device("cpu")
    exact = PatchReader(slide, coords, 100, 0.25)
    decode = nvjpeg.decode
    for wrong, says in (
        (lambda *given: [255 - tile for tile in decode(*given)], "grey levels on average"),
        (lambda *_: (_ for _ in ()).throw(RuntimeError("unsupported")), "unsupported"),
    ):
        monkeypatch.setattr(nvjpeg, "decode", wrong)
        reader = NvjpegReader(slide, coords, 100, 0.25, device=cpu)
        assert reader.route == "jpeg tiles"
        assert says in reader.warnings[0]
        for batch in reader.batches(16, 1):
            for row, pixels in zip(batch.rows.tolist(), batch.pixels, strict=True):
                np.testing.assert_array_equal(pixels, exact.read(row))


def test_nvjpeg_is_refused_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="is nvjpeg, which needs an NVIDIA GPU"):
        check_nvjpeg(torch.device("cpu"))


@needs_gpu
def test_stage_encode_with_nvjpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiled(tmp_path, "a")
    exact = features_on("cuda", job, RESNET, monkeypatch)
    found = features_on("cuda", job, RESNET, monkeypatch, "nvjpeg")
    assert open_store(job.output).attributes.reader == "nvjpeg"
    assert json.loads(job.record.read_text())["counts"]["kept"] == len(found)
    cosine = (found * exact).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosine.min() > 0.99
