"""Stage encode: where patches come from, what the store holds, and what happens to slides that break."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from preprocessing.encode import encode_slide
from preprocessing.encoders import Encoder, EncoderSettings
from preprocessing.errors import SlideError
from preprocessing.grid import lay_grid
from preprocessing.patches import read_batches
from preprocessing.slide import open_slide
from preprocessing.tile import Outputs, TilingSettings, tile_slide
from slidestore import StoreError, open_store
from tests.slides import PINK, blob, write_aperio

TINY = EncoderSettings(name="tiny", model="test_resnet", weights="random", batch_size=16)
LINES_UM = 10  # distance of the painted lines


def tile(path: Path, patch_px: int = 64) -> Outputs:
    ends = (".npy", ".json", ".thumbnail.jpg", ".mask.png", ".geojson")
    outputs = Outputs(*(path.parent / f"S1{end}" for end in ends))
    tile_slide(path, "S1", "a", TilingSettings(patch_px=patch_px), outputs)
    return outputs


def encode(path: Path, outputs: Outputs, settings: EncoderSettings = TINY, threads: int = 1) -> Path:
    store = path.parent / "S1.zarr.zip"
    encode_slide(path, outputs.coords, outputs.record, settings, store, threads)
    return store


@pytest.mark.parametrize(
    ("level0_mpp", "target_mpp", "downsamples"),
    [
        (0.5, 0.5, (1,)),
        (0.25, 0.5, (1,)),
        (0.25, 0.5, (1, 2, 4)),
        (0.31, 0.5, (1, 4)),
        (0.31, 1.0, (1, 2)),
        (0.2425, 1.0, (1, 4, 16)),
    ],
)
def test_a_painted_grid_lands_where_it_should(
    tmp_path: Path, level0_mpp: float, target_mpp: float, downsamples: tuple[int, ...]
) -> None:
    """Dark lines every 10 µm, painted at level 0: in every patch their centres are off by under a pixel."""
    width, height, patch_px = 2300, 1400, 96
    at_um = [(np.arange(n) + 0.5) * level0_mpp for n in (width, height)]
    dark = [np.abs((um - LINES_UM / 2) % LINES_UM - LINES_UM / 2) < 1 for um in at_um]  # lines 2 µm wide
    image = np.full((height, width, 3), PINK, np.uint8)
    image[dark[1][:, None] | dark[0][None]] = (60, 20, 60)
    path = write_aperio(tmp_path / "a.svs", image, level0_mpp, downsamples=downsamples)

    slide = open_slide(path, "S1", "a")
    patch_px_level0 = patch_px * target_mpp / level0_mpp
    grid = lay_grid((width, height), patch_px_level0, patch_px_level0)
    coords = grid.coords(np.ones(grid.shape, bool))
    record = {"patch_px": patch_px, "mpp": target_mpp, "patch_px_level0": patch_px_level0}
    patches = np.concatenate(list(read_batches(slide, coords, record["patch_px"], record["mpp"], 16, 2)))
    assert patches.shape == (len(coords), patch_px, patch_px, 3)

    centres_um = (np.arange(patch_px) + 0.5) * target_mpp
    for (x, y), patch in zip(coords, patches, strict=True):
        for start, profile in ((x, patch[..., 1].mean(axis=0)), (y, patch[..., 1].mean(axis=1))):
            darkness = profile.max() - profile
            seen = start * level0_mpp + centres_um
            for line in np.arange(0, seen[-1], LINES_UM):
                near = np.abs(seen - line) < 3
                if line - 3 > seen[0] and line + 3 < seen[-1]:
                    centre = np.average(seen[near], weights=darkness[near])
                    assert abs(centre - line) < target_mpp, (x, y, line)


def test_rows_belong_to_their_patches(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 700, 250))
    outputs = tile(path)
    store = open_store(encode(path, outputs, threads=3), encoder="tiny")
    record = json.loads(outputs.record.read_text())
    np.testing.assert_array_equal(store.coords, np.load(outputs.coords))
    assert store.shape == (record["counts"]["kept"], 96)
    assert store.attributes.failure is None
    assert store.attributes.tiling_hash == record["tiling_hash"]
    assert store.attributes.source == record["source"]

    encoder = Encoder(TINY, 64)
    slide = open_slide(path, "S1", "a")
    assert store.attributes.encoder_weights_sha256 == encoder.weights_sha256
    for row in (0, 17, len(store.coords) - 1):
        x, y = store.coords[row]
        patch = torch.from_numpy(slide.read_region(x, y, 0, 64, 64)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            expected = encoder(patch).numpy()[0]
        np.testing.assert_allclose(store.features[row], expected, rtol=2e-3, atol=2e-3)


def test_equal_runs_give_equal_stores(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 700, 250))
    outputs = tile(path)
    first, second = (encode(path, outputs, threads=2).read_bytes() for _ in range(2))
    assert first == second


def test_a_slide_that_tile_failed_gets_a_store_that_says_so(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 700, 250), mpp=None)
    store = open_store(encode(path, tile(path)), encoder="tiny")
    assert store.shape == (0, 0)
    assert store.attributes.failure is not None
    assert store.attributes.failure["stage"] == "tile"
    assert "has no mpp" in store.attributes.failure["reason"]


def test_a_slide_that_breaks_in_the_middle_gets_a_store_that_says_so(tmp_path: Path) -> None:
    """A JPEG tile of level 0 is damaged: the thumbnail comes from level 1, so tile does not notice."""
    path = write_aperio(tmp_path / "a.svs", blob(1400, 1400, 500), downsamples=(1, 16))
    outputs = tile(path)
    assert json.loads(outputs.record.read_text())["status"] == "ok"
    damaged = bytearray(path.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 20_000] = bytes(20_000)
    path.write_bytes(damaged)
    store = open_store(encode(path, outputs))
    assert store.shape == (0, 0)
    assert store.attributes.failure is not None
    assert store.attributes.failure["stage"] == "encode"
    assert f"slide S1 ({path}) cannot be decoded" in store.attributes.failure["reason"]


def test_a_reader_that_fails_stops_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_slide(write_aperio(tmp_path / "a.svs", blob(900, 700, 250)), "S1", "a")
    monkeypatch.setattr(type(slide), "read_region", lambda *_: (_ for _ in ()).throw(SlideError("broken")))
    with pytest.raises(SlideError, match="broken"):
        list(read_batches(slide, np.zeros((100, 2), np.int32), 64, 0.5, 8, 2))


def test_coords_of_another_tiling_are_refused(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 700, 250))
    outputs = tile(path)
    np.save(outputs.coords, np.load(outputs.coords)[1:])
    with pytest.raises(ValueError, match=r"S1.npy and .*S1.json are not of the same tiling: tile the slide again"):
        encode(path, outputs)


def test_an_encoder_that_does_not_fit_stops_the_job(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 700, 250))
    with pytest.raises(ValueError, match="takes patches of 160 px"):
        encode(path, tile(path), EncoderSettings(name="v", model="test_vit", weights="random"))
    assert not (tmp_path / "S1.zarr.zip").exists()


@pytest.mark.slow
def test_kill_9_at_ten_random_moments(tmp_path: Path) -> None:
    """After each kill there is no file that looks complete; after each rerun the store is that of a calm run."""
    path = write_aperio(tmp_path / "a.svs", blob(3000, 3000, 1300))
    outputs, store = tile(path, 32), tmp_path / "out" / "S1.zarr.zip"
    settings = json.dumps({"name": "tiny", "model": "test_resnet", "weights": "random", "batch_size": 8})
    command = [sys.executable, "-m", "preprocessing", "encode", "--slide", str(path), "--coords", str(outputs.coords)]
    command += ["--record", str(outputs.record), "--settings", settings, "--output", str(store)]
    root = Path(__file__).parents[2]

    def run(**options: float) -> None:
        started = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
        try:
            assert started.wait(**options) == 0
        except subprocess.TimeoutExpired:
            os.kill(started.pid, signal.SIGKILL)
            started.wait()

    start = time.monotonic()
    run()
    duration = time.monotonic() - start
    calm = store.read_bytes()
    rng = random.Random(0)
    for moment in [rng.uniform(0, 1) for _ in range(7)] + [rng.uniform(0.9, 1.02) for _ in range(3)]:
        store.unlink()
        run(timeout=moment * duration)
        if store.exists():
            assert store.read_bytes() == calm
        else:
            with pytest.raises((FileNotFoundError, StoreError)):
                open_store(store)
        assert {p.name for p in store.parent.iterdir()} <= {"S1.zarr.zip", ".S1.zarr.zip.part"}
        run()
        assert store.read_bytes() == calm
        assert [p.name for p in store.parent.iterdir()] == ["S1.zarr.zip"]
