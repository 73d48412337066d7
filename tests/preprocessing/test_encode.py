"""Stage encode: where patches come from, what the store holds, and what happens to slides that break."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from preprocessing.__main__ import parser
from preprocessing.encode import SlideJob, encode_slide, encode_slides
from preprocessing.encoders import Encoder, EncoderSettings
from preprocessing.patches import Reader, ReadingSettings
from preprocessing.slide import open_slide
from preprocessing.tile import Outputs, TilingSettings, tile_slide
from slidestore import StoreError, open_store
from tests.slides import blob, write_aperio

TINY = EncoderSettings(name="tiny", model="test_resnet", weights="random", batch_size=16)


def tile(path: Path, patch_px: int = 64) -> Outputs:
    ends = (".npy", ".json", ".thumbnail.jpg", ".mask.png", ".geojson")
    outputs = Outputs(*(path.parent / f"S1{end}" for end in ends))
    tile_slide(path, "S1", "a", TilingSettings(patch_px=patch_px), outputs)
    return outputs


def encode(
    path: Path,
    outputs: Outputs,
    settings: EncoderSettings = TINY,
    reading: ReadingSettings = ReadingSettings(),  # noqa: B008
    threads: int = 1,
) -> Path:
    store = path.parent / "S1.zarr.zip"
    encode_slide(path, outputs.coords, outputs.record, settings, reading, store, threads)
    return store


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


def damage(path: Path, tiles: slice) -> None:
    """Zeros over the beginning of some JPEG tiles of level 0."""
    with tifffile.TiffFile(path) as tif:
        offsets = tif.pages[0].dataoffsets
    with path.open("r+b") as file:
        for offset in offsets[tiles]:
            file.seek(offset)
            file.write(bytes(100))


@pytest.mark.parametrize("reader", ["exact", "openslide"])
def test_a_damaged_tile_costs_the_patches_it_touches(tmp_path: Path, reader: Reader) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(1400, 1400, 500), downsamples=(1, 16))
    outputs = tile(path)
    whole = open_store(encode(path, outputs))
    expected = whole.features
    damage(path, slice(14, 15))
    store = open_store(encode(path, outputs, reading=ReadingSettings(reader, max_damaged_share=0.2)))
    lost = {(x, y) for x, y in store.attributes.damaged}
    assert 0 < len(lost) < 0.2 * len(whole.coords)
    kept = np.array([tuple(xy) not in lost for xy in whole.coords.tolist()])
    np.testing.assert_array_equal(store.coords, whole.coords[kept])
    np.testing.assert_allclose(store.features, expected[kept], atol=2e-3)


def test_a_slide_with_too_many_damaged_patches_gets_a_store_that_says_so(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(1400, 1400, 500), downsamples=(1, 16))
    outputs = tile(path)
    damage(path, slice(10, 20))
    store = open_store(encode(path, outputs))
    assert store.shape == (0, 0)
    assert store.attributes.failure is not None
    assert store.attributes.failure["stage"] == "encode"
    assert "cannot be decoded, reading.max_damaged_share allows 0.05" in store.attributes.failure["reason"]


def test_coords_of_another_tiling_are_refused(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 700, 250))
    outputs = tile(path)
    np.save(outputs.coords, np.load(outputs.coords)[1:])
    with pytest.raises(ValueError, match=r"S1.npy and .*S1.json are not of the same tiling: tile the slide again"):
        encode(path, outputs)


def test_of_many_slides_a_bad_one_costs_only_itself(tmp_path: Path) -> None:
    """One process: three good slides, one that tile failed, one that breaks, one whose files do not belong together."""
    images = {name: blob(900 + 100 * i, 700, 250, seed=i) for i, name in enumerate(("a", "b", "c", "no-mpp", "broken"))}
    jobs = {}
    for name, image in images.items():
        path = write_aperio(tmp_path / name / "slide.svs", image, mpp=None if name == "no-mpp" else 0.5)
        outputs = tile(path)
        jobs[name] = SlideJob(path, outputs.coords, outputs.record, tmp_path / f"{name}.zarr.zip")
    jobs["mixed"] = SlideJob(jobs["a"].slide, jobs["b"].coords, jobs["a"].record, tmp_path / "mixed.zarr.zip")
    jobs["gone"] = SlideJob(tmp_path / "none.svs", jobs["b"].coords, jobs["b"].record, tmp_path / "gone.zarr.zip")
    jobs["broken"].slide.write_bytes(jobs["broken"].slide.read_bytes()[:3000])

    with pytest.raises(ValueError, match=r"2 of 7 slides were not encoded: .*not of the same tiling.*none\.svs"):
        encode_slides([jobs[n] for n in ("mixed", "a", "broken", "gone", "b", "no-mpp", "c")], TINY, ReadingSettings())
    for name in ("a", "b", "c", "no-mpp", "broken"):
        job = jobs[name]
        together = job.output.read_bytes()
        encode_slide(job.slide, job.coords, job.record, TINY, ReadingSettings(), job.output)
        assert together == job.output.read_bytes()
    stages = {name: open_store(jobs[name].output).attributes.failure for name in ("a", "no-mpp", "broken")}
    assert {name: failure and failure["stage"] for name, failure in stages.items()} == {
        "a": None, "no-mpp": "tile", "broken": "encode",
    }  # fmt: skip
    assert not jobs["mixed"].output.exists()
    assert not jobs["gone"].output.exists()


def test_a_list_of_jobs_on_the_command_line(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 700, 250))
    outputs = tile(path)
    names = ("slide", "coords", "record", "output")
    given = [dict(zip(names, map(str, (path, *outputs.__dict__.values())), strict=False)) for _ in range(2)]
    for number, job in enumerate(given):
        job["output"] = str(tmp_path / f"{number}.zarr.zip")
    (tmp_path / "jobs.json").write_text(json.dumps(given))
    command = ["encode", "--jobs", str(tmp_path / "jobs.json"), "--settings", json.dumps(asdict(TINY))]
    args = parser().parse_args(command)
    args.run(args)
    assert (tmp_path / "0.zarr.zip").read_bytes() == (tmp_path / "1.zarr.zip").read_bytes()

    args = parser().parse_args([*command, "--slide", "a.svs"])
    with pytest.raises(SystemExit, match="--jobs or --slide, not both"):
        args.run(args)
    (tmp_path / "jobs.json").write_text(json.dumps([given[0], {**given[1], "slides": "a.svs"}]))
    with pytest.raises(ValueError, match=r"jobs.json, job 2: unknown key 'slides'; did you mean 'slide'"):
        parser().parse_args(command).run(parser().parse_args(command))


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
