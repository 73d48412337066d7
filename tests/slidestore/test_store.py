"""The contract of the store: what is written comes back, and what breaks the contract is named."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from slidestore import SCHEMA_VERSION, StoreAttributes, StoreError, open_store, write_store

ATTRIBUTES = StoreAttributes(
    slide_id="S1",
    cohort="a",
    patch_px=224,
    patch_px_level0=361.29,
    mpp=0.5,
    level0_mpp=0.31,
    level0_width=4000,
    level0_height=3000,
    magnification=20.0,
    encoder="resnet18",
    encoder_weights_sha256="0" * 64,
    tiling_hash="abc",
    source={"name": "S1.svs", "size": 1, "quickhash": "q"},
    created_by="gmmamba 0",
)


def bag(n: int = 5000, d: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    return rng.integers(0, 1000, (n, 2)), rng.standard_normal((n, d)).astype(np.float32)


def forge(path: Path, coords: np.ndarray, features: np.ndarray, **attributes: Any) -> None:
    """A store as another program might write it."""
    store = ZipStore(path, mode="w")
    group = zarr.create_group(store, attributes=asdict(ATTRIBUTES) | attributes)
    group.create_array("coords", data=coords)
    group.create_array("features", data=features)
    store.close()


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    coords, features = bag()
    path = tmp_path / "new folder" / "S1.zarr.zip"
    write_store(path, coords, features, ATTRIBUTES)
    store = open_store(path, encoder="resnet18")
    assert store.attributes == ATTRIBUTES
    assert store.coords.dtype == np.int32
    assert store.features.dtype == np.float16
    assert store.shape == (5000, 8)
    np.testing.assert_array_equal(store.coords, coords)
    np.testing.assert_array_equal(store.features, features.astype(np.float16))
    assert [p.name for p in path.parent.iterdir()] == ["S1.zarr.zip"]


def test_chunks_are_few(tmp_path: Path) -> None:
    write_store(tmp_path / "s.zarr.zip", *bag(5000), ATTRIBUTES)
    array = zarr.open_group(ZipStore(tmp_path / "s.zarr.zip", mode="r"), mode="r")["features"]
    assert isinstance(array, zarr.Array)
    assert array.chunks == (4096, 8)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_store(tmp_path / name, *bag(), ATTRIBUTES)
        time.sleep(0.01)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_slide_has_a_store_without_patches(tmp_path: Path) -> None:
    failure = {"stage": "tile", "reason": "truncated"}
    attributes = replace(ATTRIBUTES, level0_mpp=None, patch_px_level0=None, failure=failure)
    write_store(tmp_path / "s", np.empty((0, 2)), np.empty((0, 0)), attributes)
    store = open_store(tmp_path / "s")
    assert store.shape == (0, 0)
    assert store.features.shape == (0, 0)
    assert store.attributes.failure == failure


def test_foreign_encoder_is_named(tmp_path: Path) -> None:
    write_store(tmp_path / "s", *bag(3), ATTRIBUTES)
    with pytest.raises(StoreError, match=r"s: features are of encoder 'resnet18', asked for 'uni'"):
        open_store(tmp_path / "s", encoder="uni")


def test_missing_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_store(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("coords", "features", "attributes", "message"),
    [
        (np.zeros((3, 2), np.int32), np.zeros((3, 4), np.float16), {"schema_version": "0.1"}, "'0.1'.*again"),
        (np.zeros((3, 2), np.int32), np.zeros((2, 4), np.float16), {}, r"misaligned rows, coords \(3, 2\)"),
        (np.zeros((3, 3), np.int32), np.zeros((3, 4), np.float16), {}, "misaligned"),
        (np.zeros((3, 2), np.int32), np.zeros((3, 4), np.float32), {}, "float32.*expected int32 and float16"),
        (np.zeros((3, 2), np.int32), np.zeros((3, 4), np.float16), {"slideid": "x"}, "'slideid'; did you mean"),
    ],
)
def test_a_broken_contract_is_named(
    tmp_path: Path, coords: np.ndarray, features: np.ndarray, attributes: dict[str, Any], message: str
) -> None:
    forge(tmp_path / "s.zarr.zip", coords, features, **attributes)
    with pytest.raises(StoreError, match=f"s.zarr.zip.*{message}"):
        open_store(tmp_path / "s.zarr.zip")


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    features = np.zeros((3, 4), np.float16)
    features[1, 2] = np.nan
    forge(tmp_path / "s", np.zeros((3, 2), np.int32), features, schema_version=SCHEMA_VERSION)
    store = open_store(tmp_path / "s")  # cheap: features are not read here
    with pytest.raises(StoreError, match=r"s: features of 1 of 3 patches are not finite \(first: row 1\)"):
        _ = store.features
    with pytest.raises(ValueError, match="not finite in float16"):
        write_store(tmp_path / "t", np.zeros((1, 2)), np.full((1, 4), 1e6), ATTRIBUTES)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, share: float) -> None:
    write_store(tmp_path / "s", *bag(100), ATTRIBUTES)
    whole = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(StoreError, match=r"s: no whole slide store.*delete the file and encode the slide again"):
        open_store(tmp_path / "s")


def test_damaged_features_are_named(tmp_path: Path) -> None:
    write_store(tmp_path / "s", *bag(4096), ATTRIBUTES)
    damaged = bytearray((tmp_path / "s").read_bytes())
    middle = damaged.index(b"features/c/0/0") + 5000
    damaged[middle : middle + 50] = bytes(50)
    (tmp_path / "s").write_bytes(damaged)
    with pytest.raises(StoreError, match="s: no whole slide store"):
        _ = open_store(tmp_path / "s").features


WRITE_FOR_EVER = """
import sys
from tests.slidestore.test_store import ATTRIBUTES, bag, write_store
print("ready", flush=True)
while True:
    for n in (2000, 3000):
        write_store(sys.argv[1], *bag(n, 64), ATTRIBUTES)
"""


def test_kill_9_while_writing_leaves_a_whole_store_or_none(tmp_path: Path) -> None:
    path = tmp_path / "S1.zarr.zip"
    expected = set()
    for n in (2000, 3000):
        write_store(path, *bag(n, 64), ATTRIBUTES)
        expected.add(path.read_bytes())
    path.unlink()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOR_EVER, str(path)], env=environment, stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(random.random() * 0.2)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert not path.exists() or path.read_bytes() in expected
    write_store(path, *bag(2000, 64), ATTRIBUTES)
    assert [p.name for p in tmp_path.iterdir()] == ["S1.zarr.zip"]  # what the killed ones left is gone
