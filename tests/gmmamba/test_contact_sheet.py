"""The contact sheet: every slide of a cohort on one page, its problems first."""

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from gmmamba.cohort import read_sheet
from gmmamba.contact_sheet import WORDS, contact_sheet

COUNTS = {"grid": 0, "kept": 0, **dict.fromkeys(WORDS, 0)}


def write_slide(tiles: Path, slide_id: str, **record: Any) -> None:
    """What `tile_slide` would write, of a slide of 4000 x 3000 px with one square of tissue."""
    ring = [[1000, 1000], [3000, 1000], [3000, 2000], [1000, 2000], [1000, 1000]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    plain = {
        "status": "ok", "reason": None, "level0_width": 4000, "level0_height": 3000, "level0_mpp": 0.25,
        "mpp_source": "file", "tissue_mm2": 1.25, "tissue_mask": None, "counts": COUNTS, "warnings": [],
    }  # fmt: skip
    (tiles / f"{slide_id}.json").write_text(json.dumps(plain | record))
    (tiles / f"{slide_id}.geojson").write_text(json.dumps({"features": [{"geometry": geometry}]}))
    Image.new("RGB", (1024, 768), (230, 200, 215)).save(tiles / f"{slide_id}.thumbnail.jpg")


def test_failed_slides_come_first_and_nobody_is_missing(tmp_path: Path) -> None:
    write_slide(tmp_path, "good", counts=COUNTS | {"grid": 1200, "kept": 1150, "little_tissue": 40, "ink": 10})
    write_slide(tmp_path, "odd", warnings=["implausible colours: <red>"], tissue_mask="own.geojson")
    write_slide(tmp_path, "empty", status="failed", reason="no patch", tissue_mm2=0.0)
    write_slide(tmp_path, "broken", status="failed", reason="cannot be opened", level0_width=None, level0_mpp=None)
    rows = [f"{name},p-{name},normal,{name}.svs," for name in ("good", "odd", "empty", "broken")]
    for name in ("good", "odd", "empty", "broken"):
        (tmp_path / f"{name}.svs").touch()
    sheet = tmp_path / "slides.csv"
    sheet.write_text("\n".join(["slide_id,patient_id,label,path,exclude", *rows, "out,p,normal,x.svs,smeared"]))
    slides, problems = read_sheet(sheet, "a")
    assert not problems
    contact_sheet("a", list(slides.values()), tmp_path, tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text()
    assert re.findall(r"<h2>(\w+) ", page) == ["empty", "broken", "odd", "good"]
    assert page.count("data:image/jpeg;base64,") == 3  # of the one that could not be opened there is none
    for text in (
        "a: 4 slides", "2 failed, 1 with a warning, 1 excluded", "failed: cannot be opened", "&lt;red&gt;",
        "1,150 of 1,200 patches, 1.25 mm², 0.25 µm/px (file)", "dropped: 10 ink, 40 too little tissue",
        "tissue from own.geojson", "out <span", "normal: smeared",
    ):  # fmt: skip
        assert text in page, text
    assert "http" not in page


def test_a_hundred_slides_are_a_page_of_reasonable_size(tmp_path: Path) -> None:
    """Pictures as rich in detail as real ones: noise over the whole thumbnail."""
    rows = ["slide_id,patient_id,label,path"]
    for i in range(100):
        write_slide(tmp_path, f"s{i}", counts=COUNTS | {"grid": 9, "kept": 9})
        Image.effect_noise((1024, 768), 60).convert("RGB").save(tmp_path / f"s{i}.thumbnail.jpg", quality=60)
        (tmp_path / f"s{i}.svs").touch()
        rows.append(f"s{i},p{i},normal,s{i}.svs")
    (tmp_path / "slides.csv").write_text("\n".join(rows))
    slides, _ = read_sheet(tmp_path / "slides.csv", "a")
    contact_sheet("a", list(slides.values()), tmp_path, tmp_path / "sheet.html")
    assert (tmp_path / "sheet.html").stat().st_size < 5_000_000
