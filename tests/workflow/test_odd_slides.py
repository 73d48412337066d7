"""Fifty slides as they come, most of them odd or broken, through one real run: the accounting adds up, every reason
names its slide and what to do, and the good ones have the features that they have among themselves."""

from __future__ import annotations

import csv
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import yaml
from PIL import Image

from benchmarks.faults import command
from slidestore import open_store
from tests.slides import WHITE, plain, tissue, write_aperio, write_tiled

pytestmark = pytest.mark.slow

WIDTH, HEIGHT = 900, 700
CONFIG = {
    "cohorts": {"a": {"sheet": "slides.csv"}},
    "tiling": {"patch_px": 64, "mpp": 0.5},
    "reading": {"max_damaged_share": 0.3},
    "encoders": {"tiny": {"model": "test_resnet", "weights": "random", "batch_size": 16}},
    "datasets": {},
    "experiments": {},
    "max_failed_share": 1.0,
}
Make = Callable[[Path], object]


@dataclass
class Odd:
    """make writes the slide; reason is what its failure says, "" for one that must have patches; mpp is the sheet's."""

    make: Make
    reason: str = ""
    mpp: str = "0.5"
    name: str = "slide.tif"
    damaged: bool = False


def image(seed: int = 0) -> np.ndarray:
    return tissue(WIDTH, HEIGHT, seed, dark=True)


def tiled(**layout: object) -> Make:
    return lambda path: write_tiled(path, image(), **layout)  # type: ignore[arg-type]


def aperio(**facts: object) -> Make:
    return lambda path: write_aperio(path, image(), **facts)  # type: ignore[arg-type]


def written(pixels: np.ndarray | None = None, **options: object) -> Make:
    return lambda path: tifffile.imwrite(path, image() if pixels is None else pixels, metadata=None, **options)  # type: ignore[arg-type]


def truncated(share: float) -> Make:
    def make(path: Path) -> None:
        write_tiled(path, image(), downsamples=(1, 4), aperio=True)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return make


def with_zeros_at(tiles: slice, length: int = 200) -> Make:
    """Some JPEG tiles of level 0 begin with zeros."""

    def make(path: Path) -> None:
        write_tiled(path, image(), tile=(128, 128), downsamples=(1, 4), aperio=True)
        with tifffile.TiffFile(path) as tif:
            offsets = tif.pages[0].dataoffsets
        with path.open("r+b") as file:
            for offset in offsets[tiles]:
                file.seek(offset)
                file.write(bytes(length))

    return make


def with_a_hole(path: Path) -> None:
    """The size of one tile of level 0 is zero: the file leaves it out."""
    write_tiled(path, image(), tile=(128, 128), aperio=True)
    with tifffile.TiffFile(path) as tif:
        counts = tif.pages[0].tags["TileByteCounts"]
        where = counts.valueoffset + 4 * 20
    with path.open("r+b") as file:
        file.seek(where)
        file.write(struct.pack("<I", 0))


def with_a_wild_offset(path: Path) -> None:
    write_tiled(path, image())
    with path.open("r+b") as file:
        file.seek(4)
        file.write(struct.pack("<I", 2**31))


def dicom(path: Path, shared: Path) -> None:
    path.mkdir()
    for file in (shared / "data/slides/cmu-1-small-region-dicom").glob("*.dcm"):
        shutil.copyfile(file, path / file.name)


def huge(path: Path) -> None:
    Image.new("1", (20000, 20000)).save(path)


def odd_slides(shared: Path) -> dict[str, Odd]:
    tissueless = "no patch with at least 50% tissue.*look at"
    opened, decoded = r"cannot be opened .*copy it anew", r"cannot be decoded.*copy it anew"
    picture, sixteen, grey = Image.fromarray(image()), image().astype(np.uint16) * 257, image()[..., 1]
    slides = {
        "ycbcr_420": Odd(tiled()),
        "ycbcr_422": Odd(tiled(subsampling="422")),
        "rgb_444": Odd(tiled(colours="rgb", subsampling="444")),
        "shared_tables": Odd(tiled(shared_tables=True)),
        "small_tiles": Odd(tiled(tile=(64, 64))),
        "oblong_tiles": Odd(tiled(tile=(240, 112))),
        "two_levels": Odd(tiled(downsamples=(1, 4))),
        "uneven_levels": Odd(tiled(downsamples=(1, 3.97))),
        "mpp_in_the_file": Odd(aperio(mpp=0.5), mpp=""),
        "fine_scale": Odd(aperio(mpp=0.31), mpp=""),
        "coarse_scale": Odd(aperio(mpp=0.9), mpp=""),
        "bigtiff": Odd(written(bigtiff=True, tile=(256, 256), compression="jpeg", photometric="rgb")),
        "lzw": Odd(written(tile=(256, 256), compression="lzw", photometric="rgb")),
        "deflate": Odd(written(tile=(256, 256), compression="zlib", photometric="rgb")),
        "uncompressed": Odd(written(tile=(256, 256), photometric="rgb")),
        "jpeg2000": Odd(lambda p: shutil.copyfile(shared / "data/slides/TCGA-CR-7395-01A-01-TS1.svs", p)),
        "dicom": Odd(lambda p: dicom(p, shared), mpp="", name="folder"),
        "flat_strips": Odd(written(rowsperstrip=64, photometric="rgb")),
        "flat_png": Odd(lambda p: picture.save(p), name="flat.png"),
        "flat_jpeg": Odd(lambda p: picture.save(p, quality=95), name="flat.jpg"),
        "wrong_extension": Odd(lambda p: write_tiled(p, image()), name="slide.jpg"),
        "no_extension": Odd(lambda p: write_tiled(p, image()), name="slide"),
        "uppercase": Odd(lambda p: write_tiled(p, image()), name="SLIDE.TIF"),
        "one_tile_damaged": Odd(with_zeros_at(slice(20, 21)), damaged=True),
        "a_tile_left_out": Odd(with_a_hole),
        "most_tiles_damaged": Odd(with_zeros_at(slice(0, None)), decoded),
        "a_third_damaged": Odd(with_zeros_at(slice(10, 40)), decoded),
        "zero_bytes": Odd(lambda p: p.touch(), opened),
        "text": Odd(lambda p: p.write_text("not a slide at all"), opened),
        "wild_offset": Odd(with_a_wild_offset, opened),
        "empty_folder": Odd(lambda p: p.mkdir(), "a folder without .dcm files: give the slide's file", name="folder"),
        "sixteen_bits": Odd(written(pixels=sixteen, photometric="rgb", rowsperstrip=64)),
        "grey": Odd(written(pixels=grey, photometric="minisblack", rowsperstrip=64), "mode L, not RGB: convert it"),
        "flat_too_large": Odd(huge, "flat picture of 20000 x 20000 px, more than", name="large.png"),
        "no_mpp": Odd(tiled(), r"has no mpp: add an 'mpp' column", mpp=""),
        "absurd_mpp": Odd(aperio(mpp=25), r"absurd mpp, 25 .*add an 'mpp' column", mpp=""),
        "contradiction": Odd(aperio(mpp=0.5, power=40), "contradicts 0.25, the obj.*add an 'mpp' column", mpp=""),
        "white": Odd(lambda p: write_tiled(p, plain(WIDTH, HEIGHT, WHITE)), tissueless),
        "black": Odd(lambda p: write_tiled(p, plain(WIDTH, HEIGHT, (0, 0, 0))), tissueless),
        "smaller_than_a_patch": Odd(lambda p: write_tiled(p, tissue(60, 60)), tissueless),
    }  # fmt: skip
    return slides | {f"truncated_{share}": Odd(truncated(share / 10)) for share in range(10)}


def run(project: Path, slides: dict[str, Odd]) -> pd.DataFrame:
    """Tile and encode the slides of `project`; the slide table by slide_id."""
    rows = [[name, name, "x", f"{name}/{odd.name}", odd.mpp] for name, odd in slides.items()]
    with (project / "slides.csv").open("w", newline="") as sheet:
        csv.writer(sheet).writerows([["slide_id", "patient_id", "label", "path", "mpp"], *rows])
    (project / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    table = "results/a/features/tiny.csv"
    finished = subprocess.run(command(project, "--cores", "2", table), capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return pd.read_csv(project / table, keep_default_na=False).set_index("slide_id")


def test_fifty_odd_slides(shared: Path, tmp_path: Path) -> None:
    slides = odd_slides(shared)
    assert len(slides) == 50
    together, alone = tmp_path / "together", tmp_path / "alone"
    for project in (together, alone):
        for name, odd in slides.items():
            (project / name).mkdir(parents=True)
            odd.make(project / name / odd.name)
    table = run(together, slides)
    assert sorted(table.index) == sorted(slides)
    assert set(table.status) == {"ready", "failed"}
    for name, odd in slides.items():
        row = table.loc[name]
        if name.startswith("truncated"):  # the cut may have left every tile of level 0: then all is well
            continue
        assert row.status == ("failed" if odd.reason else "ready"), f"{name}: {row.reason}"
        if odd.reason:
            assert name in row.reason
            assert pd.Series([row.reason]).str.contains(odd.reason).all(), f"{name}: {row.reason}"
        else:
            assert row.n_patches > 5
        assert (row.n_damaged > 0) == odd.damaged, name
    cut = table[table.index.str.startswith("truncated")]
    assert (cut.status == "failed").sum() >= 8
    assert all(name in row.reason and "copy it anew" in row.reason for name, row in cut.iterrows() if row.reason)

    good = {name: odd for name, odd in slides.items() if table.status[name] == "ready"}
    assert (run(alone, good).status == "ready").all()
    for name in good:
        stores = [folder / "results/a/features/tiny" / f"{name}.zarr.zip" for folder in (together, alone)]
        assert stores[0].read_bytes() == stores[1].read_bytes()
        assert len(open_store(stores[0]).features) == table.n_patches[name]
