"""The pages for people: no link leads to nowhere, and what is cited is this version."""

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

import slidestore

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "config/README.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)


def without_code(text: str) -> str:
    """The page without fenced blocks and code in a line: brackets in there are no links."""
    return re.sub(r"`[^`\n]+`", "`code`", re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE))


@cache
def anchors(page: Path) -> set[str]:
    """What a heading can be reached by, as GitHub names it: lower case, hyphens for spaces, no punctuation; the second
    heading of a name has -1 behind it."""
    seen: Counter[str] = Counter()
    found = set()
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, re.MULTILINE):
        shown = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def leads_somewhere(page: Path, link: str) -> bool:
    """Whether a relative link of the page is a file or folder of the project and, with an anchor, a heading of it."""
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.exists() or not target.is_relative_to(ROOT):
        return False
    return not anchor or (target.suffix == ".md" and anchor in anchors(target))


def dead_links(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere; those to the web are not looked at."""
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", without_code(page.read_text(encoding="utf-8")))
    relative = [link for link in links if not re.match(r"[a-z][a-z+.-]*:", link)]
    return [link for link in relative if not leads_somewhere(page, link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "there.md").write_text("# A `code` heading: twice\n\n## Same\n\n## Same\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[![both](gone.jpg)](there.md) [a](there.md#a-code-heading-twice) [b](there.md#same-1) [c](there.md#same-2)\n"
        "[d](../outside.md) [e](#nothing) [f](https://example.org/x.md) `[g](code.md)`\n```\n[h](block.md)\n```\n"
    )
    assert dead_links(page) == ["gone.jpg", "there.md#same-2", "../outside.md", "#nothing"]


def test_the_citation_is_of_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == slidestore.__version__
