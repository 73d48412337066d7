"""The viewer as people use it: overlays, deep zoom, the list, all of it from the keyboard."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page

from gmmamba.view.dataset import read_dataset
from gmmamba.view.server import Viewer, make_server
from tests.browser.conftest import Watched, wait_until
from tests.gmmamba.synthetic import CLASSES
from tests.gmmamba.viewed import RIGHT, label_of, make_viewed

pytestmark = pytest.mark.browser
LOADED = """() => {
    const items = [...Array(viewer.world.getItemCount()).keys()].map((i) => viewer.world.getItemAt(i));
    return items.length > 0 && items.every((item) => item.getFullyLoaded());
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    results: Path = make_viewed(tmp_path_factory.mktemp("viewed"))
    with make_server(Viewer(read_dataset(results))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.fixture
def viewer(watched: Watched, address: str) -> Watched:
    watched.page.goto(address)
    settled(watched.page)
    return watched


def settled(page: Page) -> np.ndarray:
    """The slide (H, W, 3) once everything has loaded and nothing moves any more."""
    wait_until(page, lambda: page.evaluate(LOADED))  # the page's own policy forbids wait_for_function's eval
    before = None
    for _ in range(50):
        page.wait_for_timeout(150)
        now = np.asarray(Image.open(io.BytesIO(page.locator("#viewer").screenshot())).convert("RGB")).astype(int)
        if before is not None and (now == before).all():
            return now
        before = now
    raise AssertionError("the slide does not come to rest")


def listed(page: Page) -> list[str]:
    return page.locator("#slides button b").all_text_contents()


def opened(page: Page) -> str:
    return page.locator("#title").inner_text()


def test_the_most_wrong_slide_comes_first_and_is_open(viewer: Watched) -> None:
    page = viewer.page
    assert listed(page) == [*sorted(RIGHT, key=lambda slide_id: RIGHT[slide_id][0]), "broken"]
    assert opened(page) == f"s3: {label_of('s3')}"
    first = page.locator("#slides button").first.inner_text()
    assert "P = 0.05 ✗" in first
    assert "fold 1" in first
    assert "7 of 7 slides, 2 called wrong" in page.locator("#count").inner_text()
    page.select_option("#by", "mean")
    assert listed(page)[0] == "s2"  # 0.4


def test_overlays_switch(viewer: Watched) -> None:
    page = viewer.page
    page.get_by_label("foci").uncheck()
    shown = {"attention": settled(page)}
    for key, name in (("1", "nothing"), ("3", "groups")):
        page.keyboard.press(key)
        shown[name] = settled(page)
    for name, other in (("nothing", "attention"), ("nothing", "groups"), ("attention", "groups")):
        assert (np.abs(shown[name] - shown[other]).max(axis=2) > 20).mean() > 0.2, (name, other)
    for label in ("tissue", "foci"):
        page.get_by_label(label).check()
        with_shape = settled(page)
        page.get_by_label(label).uncheck()
        assert 0 < (np.abs(with_shape - settled(page)).max(axis=2) > 20).mean() < 0.1, label
    page.keyboard.press("2")
    settled(page)
    page.locator("#opacity").fill("0")
    assert (np.abs(settled(page) - shown["nothing"]).max(axis=2) > 20).mean() < 0.01
    page.locator("#opacity").fill("60")
    page.select_option("#scale", "rank")
    assert (np.abs(settled(page) - shown["attention"]).max(axis=2) > 5).any()


def test_zooming_in_loads_finer_tiles(viewer: Watched) -> None:
    page = viewer.page
    deepest = page.evaluate("current.max_level")

    def levels() -> set[int]:
        return {int(match[1]) for url in viewer.requests if (match := re.search(r"/s3_files/(\d+)/", url))}

    assert max(levels()) < deepest
    page.keyboard.press("1")
    whole = settled(page)
    for _ in range(3):
        page.get_by_role("button", name="Zoom in").click()
    wait_until(page, lambda: deepest in levels())
    assert (np.abs(settled(page) - whole).max(axis=2) > 20).mean() > 0.1
    assert page.locator("#bar span").inner_text().endswith("µm")
    page.get_by_role("button", name="Whole slide").click()
    assert (np.abs(settled(page) - whole).max(axis=2) > 20).mean() < 0.01


def test_the_list_works_from_the_keyboard(viewer: Watched) -> None:
    page = viewer.page
    order = listed(page)
    page.locator("#find").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert opened(page).startswith(order[0])  # arrows move, Enter opens
    page.keyboard.press("Enter")
    wait_until(page, lambda: opened(page).startswith(order[1]))
    assert page.locator("[aria-current]").get_attribute("data-slide") == order[1]
    page.keyboard.press("n")
    wait_until(page, lambda: opened(page).startswith(order[2]))
    page.keyboard.press("p")
    wait_until(page, lambda: opened(page).startswith(order[1]))
    page.locator("#find").fill("s2")
    assert listed(page) == ["s2"]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_until(page, lambda: opened(page) == f"s2: {CLASSES[0]}")
    settled(page)


def test_a_slide_without_a_file_says_so(viewer: Watched) -> None:
    page = viewer.page
    page.locator("[data-slide=gone]").click()
    page.get_by_role("alert").wait_for()
    assert "no such file" in page.get_by_role("alert").inner_text()
    assert page.evaluate("viewer.world.getItemCount()") == 0
    page.locator("[data-slide=s0]").click()
    wait_until(page, lambda: opened(page).startswith("s0"))
    settled(page)
    assert not page.get_by_role("alert").is_visible()
