"""The report as people open it: from disk, without a network, on a laptop, a phone and paper."""

from pathlib import Path

import pytest

from gmmamba.report import Outputs, report
from tests.browser.conftest import Watched, wait_until
from tests.gmmamba.finished import METHODS, make_finished

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    names = ("report.html", "table.csv", "accounting.csv", "report.json")
    report(**make_finished(folder), outputs=Outputs(*(folder / name for name in names)))
    return folder / "report.html"


@pytest.fixture
def opened(watched: Watched, page_file: Path) -> Watched:
    watched.page.context.set_offline(True)
    watched.page.goto(page_file.as_uri())
    return watched


def test_it_opens_from_disk_without_a_network_and_shows_every_picture(opened: Watched) -> None:
    page = opened.page
    assert all(url.startswith(("file:", "data:")) for url in opened.requests)
    widths = page.eval_on_selector_all("img", "images => images.map((image) => image.complete && image.naturalWidth)")
    assert len(widths) >= 4 * len(METHODS)
    assert all(widths)


@pytest.mark.parametrize("width", [1366, 400])
def test_nothing_hangs_over_the_edge(opened: Watched, width: int) -> None:
    page = opened.page
    page.set_viewport_size({"width": width, "height": 768})
    page.eval_on_selector_all("details", "all => all.forEach((each) => { each.open = true; })")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width


def test_sections_and_details_are_reached_from_the_keyboard(opened: Watched) -> None:
    page = opened.page
    links = page.locator("nav a")
    for number in range(links.count()):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('href')") == links.nth(number).get_attribute("href")
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == links.last.get_attribute("href")
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.get_attribute("open") is not None
    for href in (links.nth(number).get_attribute("href") for number in range(links.count())):
        assert page.locator(f"section{href}").count() == 1


def test_it_prints_on_paper(opened: Watched, tmp_path: Path) -> None:
    """No table or picture is wider than the sheet, and links of the page are left out."""
    page = opened.page
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 703, "height": 1000})  # A4 less 12 mm on either side, at 96 dpi
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 703
    assert not page.locator("nav").is_visible()
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    wait_until(page, lambda: (tmp_path / "report.pdf").stat().st_size > 50_000)
