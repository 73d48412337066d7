"""contact_sheet: one page with every slide of a cohort as `tile_slide` saw it, the failed ones first.

Reads the sheet's rows and, of every slide that takes part, {slide}.json, {slide}.thumbnail.jpg and {slide}.geojson in
the folder of tiles. Writes results/{cohort}/contact_sheet.html: pictures are embedded, nothing is fetched.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, ImageDraw

from gmmamba import __version__
from gmmamba.cohort import Slide
from gmmamba.figures import jpeg
from slidestore.atomic import replace_when_whole

PICTURE_PX = (300, 210)  # at most; shown a third smaller, so that it is sharp on most screens
TISSUE, HOLE = "#00a000", "#005aff"
WORDS = {  # the counts of a record -> what became of these patches
    "outside": "over the edge",
    "ink": "ink",
    "little_tissue": "too little tissue",
    "fold": "fold",
    "white": "nearly white",
    "black": "nearly black",
    "blurred": "blurred",
    "over_cap": "over the cap",
}


@dataclass(frozen=True)
class Card:
    """A slide on the sheet. `record` is what `tile_slide` wrote; `picture` a data URI, None where nothing was read."""

    slide: Slide
    record: dict[str, Any]
    picture: str | None

    @property
    def failed(self) -> bool:
        return bool(self.record["status"] == "failed")

    @property
    def dropped(self) -> list[str]:
        """ "12 ink" and so on, of the reasons that occur."""
        return [f"{self.record['counts'][name]:,} {words}" for name, words in WORDS.items()
                if self.record["counts"][name]]  # fmt: skip


def contact_sheet(cohort: str, slides: Sequence[Slide], tiles: Path, output: Path) -> None:
    """Write the contact sheet of a cohort; see the module. `tiles` is the folder of what `tile_slide` wrote."""
    cards = [read_card(slide, tiles) for slide in slides if not slide.exclude]
    cards.sort(key=lambda card: (not card.failed, not card.record["warnings"]))  # the rest in the sheet's order
    counts = sum((Counter(card.record["counts"]) for card in cards), Counter())
    page = _template().render(
        cohort=cohort,
        cards=cards,
        excluded=[slide for slide in slides if slide.exclude],
        failed=sum(card.failed for card in cards),
        warned=sum(bool(card.record["warnings"]) for card in cards),
        tissue_mm2=sum(card.record["tissue_mm2"] for card in cards),
        counts=counts,
        words={name: words for name, words in WORDS.items() if counts[name]},
        version=__version__,
    )
    with replace_when_whole(output) as part:
        part.write_text(page, encoding="utf-8")


def read_card(slide: Slide, tiles: Path) -> Card:
    record = json.loads((tiles / f"{slide.slide_id}.json").read_text(encoding="utf-8"))
    opened = record["level0_width"] is not None  # else the thumbnail is but the reason in letters
    return Card(slide, record, draw_slide(slide.slide_id, record, tiles) if opened else None)


def draw_slide(slide_id: str, record: dict[str, Any], tiles: Path) -> str:
    """The slide's thumbnail with the outlines of its tissue (green) and the holes in it (blue), as a data URI."""
    with Image.open(tiles / f"{slide_id}.thumbnail.jpg") as thumbnail:
        picture = thumbnail.convert("RGB")
    picture.thumbnail(PICTURE_PX)
    scale = picture.width / record["level0_width"], picture.height / record["level0_height"]
    draw = ImageDraw.Draw(picture)
    for feature in json.loads((tiles / f"{slide_id}.geojson").read_text(encoding="utf-8"))["features"]:
        for i, ring in enumerate(feature["geometry"]["coordinates"]):
            draw.line([(x * scale[0], y * scale[1]) for x, y in ring], fill=HOLE if i else TISSUE, width=2)
    return jpeg(picture)


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("contact_sheet.html.j2")
