import io
import json
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import Mock

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from gmmamba.__main__ import main
from gmmamba.figures import GROUP_COLOURS, HEAT
from gmmamba.view.dataset import read_dataset
from gmmamba.view.layers import read_foci
from gmmamba.view.pixels import OpenSlides, UnreadableSlideError, open_pixels
from gmmamba.view.server import Viewer, make_server
from slidestore import open_store
from slidestore.groups import read_groups
from tests.gmmamba.synthetic import CLASSES, PATCH_PX
from tests.gmmamba.viewed import GROUPING, HEIGHT, RIGHT, WIDTH, label_of, make_viewed, write_thresholds
from tests.slides import plain, write_aperio

ROOT = Path(__file__).parents[2]
Reply = tuple[int, bytes]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_viewed(tmp_path_factory.mktemp("viewed"))


@pytest.fixture(scope="module")
def address(results: Path) -> Iterator[tuple[str, int]]:
    with make_server(Viewer(read_dataset(results))) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[:2]
        server.shutdown()


def get(address: tuple[str, int], path: str, host: str | None = None) -> Reply:
    """The path as it stands: no client tidies it up."""
    connection = HTTPConnection(*address, timeout=20)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{address[1]}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read()


def get_json(address: tuple[str, int], path: str) -> dict[str, Any]:
    status, content = get(address, path)
    assert status == 200, content
    return json.loads(content)


def get_picture(address: tuple[str, int], path: str) -> np.ndarray:
    status, content = get(address, path)
    assert status == 200, content
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))


def test_every_slide_is_listed_with_what_was_predicted_of_it(address: tuple[str, int]) -> None:
    listing = get_json(address, "/dataset.json")
    assert listing["experiments"] == ["gmmamba", "mean"]
    by_id = {slide["slide_id"]: slide for slide in listing["slides"]}
    assert set(by_id) == {*RIGHT, "broken"}
    for slide_id, expected in RIGHT.items():
        slide = by_id[slide_id]
        assert slide["label"] == label_of(slide_id)
        given = {run["experiment"]: run["probabilities"][slide["label"]] for run in slide["tested"]}
        assert given == pytest.approx(dict(zip(("gmmamba", "mean"), expected, strict=True)))
    assert {run["fold"] for run in by_id["s2"]["tested"]} == {1}
    assert by_id["broken"]["tested"] == []
    assert by_id["broken"]["reason"] == "tile: the file ends early"
    assert by_id["gone"]["no_picture"].startswith("no such file: ")
    assert "names no file" in by_id["imported"]["no_picture"]
    assert by_id["s0"]["no_picture"] == ""


def test_slides_are_called_by_the_thresholds_of_the_tables(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results.parents[1], tmp_path, dirs_exist_ok=True)

    def calls(experiment: str) -> dict[str, str]:
        slides = read_dataset(tmp_path / "results/d").slides.values()
        return {s.slide_id: run.called for s in slides for run in s.tested if run.experiment == experiment}

    assert calls("gmmamba")["s1"] == CLASSES[0]  # P(tumour) = 0.2
    write_thresholds(tmp_path / "results/d/gmmamba", 0.15)
    assert calls("gmmamba")["s1"] == CLASSES[1]
    assert calls("gmmamba")["s2"] == CLASSES[1]  # P(tumour) = 0.3
    assert calls("gmmamba")["s0"] == CLASSES[0]  # 0.1
    assert calls("mean")["s2"] == CLASSES[1]  # by its own threshold, still 0.5: P(tumour) = 0.6


def test_tiles_are_the_slide(address: tuple[str, int], results: Path) -> None:
    slide = get_json(address, "/slides/s1.json")
    assert (slide["width"], slide["height"], slide["mpp"]) == (WIDTH, HEIGHT, 0.5)
    tile = get_picture(address, f"/slides/s1_files/{slide['max_level']}/4_3.jpeg")[..., :3]
    side, overlap = slide["tile_px"], slide["overlap_px"]
    with openslide.OpenSlide(results.parents[1] / "cohort/s1.svs") as original:
        corner = (4 * side - overlap, 3 * side - overlap)
        region = np.asarray(original.read_region(corner, 0, tile.shape[1::-1]).convert("RGB"))
    assert np.abs(tile.astype(int) - region).mean() < 3  # JPEG once more
    assert get(address, f"/slides/s1_files/{slide['max_level']}/400_3.jpeg")[0] == 404
    assert get(address, f"/slides/s1_files/{slide['max_level'] + 1}/0_0.jpeg")[0] == 404


def middle(picture: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """The pixel of a picture of the whole slide at the middle of the patch with this corner."""
    x, y = ((corner + PATCH_PX / 2) * picture.shape[1] / WIDTH).astype(int)
    return picture[y, x]


def test_attention_lies_where_its_patches_lie(address: tuple[str, int], results: Path) -> None:
    coords = open_store(results.parent / "c/tiles/s3.zarr.zip").coords
    attention = np.load(results / "gmmamba/fold1_seed0/attention.npz")["s3"]
    for scale in ("linear", "rank"):
        picture = get_picture(address, f"/slides/s3/attention/gmmamba/1/0/{scale}.png")
        assert picture.shape[1] / picture.shape[0] == pytest.approx(WIDTH / HEIGHT, rel=0.01)
        assert middle(picture, coords[0])[3] == 0  # masked away
        most = np.array(HEAT(1.0)[:3]) * 255
        assert np.abs(middle(picture, coords[1])[:3] - most).max() <= 1
        shown = attention[2:] / attention.max() if scale == "linear" else attention[2:].argsort().argsort() + 1
        if scale == "rank":
            shown = shown / (len(attention) - 1)
        for corner, value in zip(coords[2:], shown, strict=True):
            r, g, b, alpha = middle(picture, corner)
            assert alpha == 255
            assert np.abs(np.array([r, g, b]) - np.array(HEAT(float(value))[:3]) * 255).max() <= 3
    taken = {tuple(corner) for corner in coords.tolist()}
    empty = next((x, y) for y in range(0, HEIGHT, PATCH_PX) for x in range(0, WIDTH, PATCH_PX) if (x, y) not in taken)
    assert middle(picture, np.array(empty))[3] == 0


def test_groups_have_the_colours_and_numbers_of_the_report(address: tuple[str, int], results: Path) -> None:
    coords, labels = read_groups(results.parent / f"c/groups/{GROUPING}.npz")["s0"]
    picture = get_picture(address, f"/slides/s0/groups/{GROUPING}.png")
    for corner, label in zip(coords, labels, strict=True):
        assert (middle(picture, corner)[:3] == GROUP_COLOURS[label]).all()
    (groups,) = get_json(address, "/slides/s0.json")["groups"]
    assert [centre["number"] for centre in groups["centres"]] == [1, 2, 3, 4]
    x, y = coords[labels == 0].mean(axis=0) + PATCH_PX / 2
    assert (groups["centres"][0]["x"], groups["centres"][0]["y"]) == pytest.approx((x, y))


def test_a_model_without_preferences_has_no_map(address: tuple[str, int]) -> None:
    slide = get_json(address, "/slides/s0.json")
    assert slide["attention"] == [{"experiment": "gmmamba", "fold": 0, "seed": 0}]
    assert get(address, "/slides/s0/attention/mean/0/0/linear.png")[0] == 404


def test_foci_and_tissue_are_in_level0_pixels(address: tuple[str, int], results: Path, tmp_path: Path) -> None:
    slide = get_json(address, "/slides/s1.json")
    assert slide["foci"] == [{"x": 448.0, "y": 224.0, "side": 224.0, "class": "tumour"}]
    assert slide["outlines"][0][0][2] == [WIDTH, HEIGHT]
    assert get_json(address, "/slides/s0.json")["foci"] == []
    listed = read_dataset(results).slides["s1"]
    foci = tmp_path / "foci.csv"
    foci.write_text("slide_id,x,y,radius_px\ns1,100,200,50\n")  # as the demo cohort has them
    (focus,) = read_foci(type(listed)(**{**vars(listed), "foci": foci}))
    assert focus == {"x": 100.0, "y": 200.0, "radius": 50.0, "class": ""}


@pytest.mark.parametrize(
    "path",
    [
        "/../report.json", "/../../cohort/slides.csv", "/slides/../../cohort/s0.svs", "//etc/passwd", "/report.json",
        "/slides/..%2f..%2fcohort%2fs0.svs", "/slides/%2e%2e/%2e%2e/cohort/slides.csv", "/slides/s0/../s1.json",
        "/slides/nobody.json", "/slides/nobody_files/10/0_0.jpeg", "/slides/s0_files/10/../../../s0.svs",
        "/slides/s0/attention/nothing/0/0/linear.png", "/slides/s0/attention/gmmamba/1/0/linear.png",
        "/slides/s0/attention/gmmamba/0/7/linear.png", "/slides/s0/groups/location-99.png", "/slides/S0.json",
        "/slides/s0/attention/../../../cohort/0/0/linear.png", "/server.py", "/openseadragon/../server.py",
        "/page.html", "/slides/s0.json%00", "/slides/s0_files/-1/0_0.jpeg", "/slides/s0_files/99/0_0.jpeg", "/slides/",
    ],
)  # fmt: skip
def test_nothing_but_what_is_listed_is_served(address: tuple[str, int], path: str) -> None:
    status, content = get(address, path)
    assert status == 404, path
    assert b"root:" not in content
    assert b"slide_id," not in content


def test_a_web_site_that_points_here_reads_nothing(address: tuple[str, int]) -> None:
    for host in (
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "",
        "[::2]:1",
        "10.0.0.1",
        "localhost:80:80",
    ):
        status, content = get(address, "/dataset.json", host or " ")
        assert status == 403, host
        assert b"slides" not in content
    for host in ("localhost:8765", "LOCALHOST:8765", "127.0.0.1", "127.0.0.2:80", "[::1]:1", "[::1]"):
        assert get(address, "/dataset.json", host)[0] == 200


def test_every_address_of_this_machine_serves(results: Path) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:  # containers often have no IPv6
            hosts = ["127.0.0.2"]
        else:
            hosts = ["127.0.0.2", "::1"]
    viewer = Viewer(read_dataset(results))
    for host in hosts:
        with make_server(viewer, host) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            port = server.server_address[1]
            assert get((host, port), "/dataset.json", f"[{host}]:{port}" if ":" in host else f"{host}:{port}")[0] == 200
            server.shutdown()


def test_slides_that_cannot_be_shown_say_why(address: tuple[str, int], results: Path) -> None:
    assert "no such file" in get_json(address, "/slides/gone.json")["no_picture"]
    assert "names no file" in get_json(address, "/slides/imported.json")["no_picture"]
    assert "cannot be opened" in get_json(address, "/slides/broken.json")["no_picture"]  # though Pillow would
    for slide_id in ("gone", "broken"):
        status, content = get(address, f"/slides/{slide_id}_files/10/0_0.jpeg")
        assert status == 422
        assert b"no such file" in content or b"cannot be opened" in content


def test_a_replaced_file_is_not_shown_under_the_old_map(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results.parents[1], tmp_path, dirs_exist_ok=True)
    write_aperio(tmp_path / "cohort/s0.svs", plain(600, 400))
    viewer = Viewer(read_dataset(tmp_path / "results/d"))
    slide = json.loads(viewer.answer("/slides/s0.json")[0])
    assert "is 600 x 400 px, the patches are of a slide of" in slide["no_picture"]
    with pytest.raises(UnreadableSlideError):
        viewer.answer("/slides/s0/attention/gmmamba/0/0/linear.png")


def test_flat_pictures_and_dicom_folders_are_opened(tmp_path: Path, shared: Path) -> None:
    Image.fromarray(plain(700, 300)).save(tmp_path / "flat.png")
    assert open_pixels(tmp_path / "flat.png").level_dimensions[-1] == (700, 300)
    assert open_pixels(shared / "data/slides/cmu-1-small-region-dicom").level_dimensions[-1] == (2220, 2967)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no slide")
    for name, why in (("empty", "without .dcm files"), ("notes.txt", "cannot be opened")):
        with pytest.raises(UnreadableSlideError, match=why):
            open_pixels(tmp_path / name)


def test_tiles_of_a_flat_picture_are_right_whoever_asks_at_once(tmp_path: Path) -> None:
    path, rng = tmp_path / "flat.png", np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (2000, 2000, 3), dtype=np.uint8)).save(path)
    level = open_pixels(path).level_count - 1
    wanted = [(column, row) for column in range(4) for row in range(2)]
    alone = OpenSlides()
    expected = [alone.tile(path, level, *tile) for tile in wanted]
    for _ in range(3):
        together = OpenSlides()
        with ThreadPoolExecutor(len(wanted)) as pool:
            found = [pool.submit(together.tile, path, level, *tile) for tile in wanted]
        assert [tile.result() for tile in found] == expected
    path.write_bytes(path.read_bytes()[:-50_000])
    with pytest.raises(UnreadableSlideError, match="cannot be opened"):
        OpenSlides().tile(path, level, 0, 0)


def test_a_tile_that_the_disk_does_not_give_is_crossed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(plain(700, 300)).save(tmp_path / "flat.png")
    slides = OpenSlides()
    monkeypatch.setattr(slides.get(tmp_path / "flat.png"), "get_tile", Mock(side_effect=OSError("stale file handle")))
    for expected in (0xDD, 200):  # at the next request the file is opened anew
        tile = np.asarray(Image.open(io.BytesIO(slides.tile(tmp_path / "flat.png", 10, 0, 0))))
        assert np.abs(np.median(tile[..., 0]) - expected) < 4


def test_a_damaged_tile_is_crossed_out_and_the_others_are_shown(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "slide.svs", plain(1024, 1024))
    with tifffile.TiffFile(path) as tif:
        at, length = tif.pages[0].dataoffsets[5], tif.pages[0].databytecounts[5]
    content = bytearray(path.read_bytes())
    content[at : at + length] = bytes(length)
    path.write_bytes(content)
    slides, level = OpenSlides(), open_pixels(path).level_count - 1
    damaged = np.asarray(Image.open(io.BytesIO(slides.tile(path, level, 1, 1))))
    whole = np.asarray(Image.open(io.BytesIO(slides.tile(path, level, 3, 3))))
    assert (np.abs(damaged.astype(int) - 0xDD).max(axis=2) < 12).mean() > 0.9
    assert np.abs(whole.mean(axis=(0, 1)) - (200, 120, 170)).max() < 4


def test_what_cannot_be_served_ends_in_one_line(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, why in (
            ([str(tmp_path)], "has no report.json: give the folder of a dataset whose report is finished, such as"),
            ([str(results.parent)], f"whose report is finished: {results}"),
            ([str(results), "--port", str(taken.getsockname()[1])], "choose others with --host and --port"),
            ([str(results), "--port", "70000"], "choose others with --host and --port"),
            ([str(results), "--host", "no.such.host.invalid"], "choose others with --host and --port"),
        ):
            assert main(["view", *arguments]) == 1
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert why in line


def test_openseadragon_comes_with_its_licence() -> None:
    folder = ROOT / "gmmamba/view/openseadragon"
    assert "License: http://openseadragon.github.io/license/" in (folder / "openseadragon.min.js").read_text()[:400]
    assert "Redistribution and use in source and binary forms" in (folder / "LICENSE.txt").read_text()
    for page in ("page.html", "view.js", "view.css"):
        text = (folder.parent / page).read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text, page
        assert "https:" not in text, page
