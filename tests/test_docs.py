"""The pages for people: no link leads to nowhere, the site has all of them, what is cited is this version."""

import dataclasses
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import slidestore
from gmmamba.config_checks import schema_problems
from gmmamba.evaluation import Evaluation
from gmmamba.models import MODELS
from gmmamba.protocol import TrainingSettings
from preprocessing.encoders import EncoderSettings
from preprocessing.tile import TilingSettings
from tests.docs import FENCE, blocks

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "config/README.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)


def without_code(text: str) -> str:
    """The page without fenced blocks and code in a line: brackets in there are no links."""
    return re.sub(r"`[^`\n]+`", "`code`", FENCE.sub("", text))


@cache
def anchors(page: Path) -> set[str]:
    """What a heading can be reached by, as GitHub names it: lower case, hyphens for spaces, no punctuation; the second
    heading of a name has -1 behind it."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
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


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "docs/site")
    import reference

    return reference


def named(nav: Any) -> list[str]:
    """The pages of a `nav`, which nests lists and dicts."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in named(part)]


def test_every_page_is_in_the_navigation(reference: Any) -> None:
    nav = named(yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)["nav"])
    assert Counter(nav) == Counter([*(page.relative_to(ROOT).as_posix() for page in PAGES), *reference.pages()])


def test_the_reference_has_every_setting_with_its_default_and_meaning(reference: Any) -> None:
    rows = re.findall(r"^\| `(\S+)` \| (.*?) \| (.*?) \| (.*) \|$", reference.configuration(), re.MULTILINE)
    assert all(meaning for *_, meaning in rows)
    listed = {(key, default) for key, _, default, _ in rows}
    for settings in (TilingSettings, EncoderSettings, TrainingSettings, Evaluation):
        for field in dataclasses.fields(settings):
            if field.name != "name" and field.default not in (dataclasses.MISSING, ()):
                value = list(field.default) if isinstance(field.default, tuple) else field.default
                assert (field.name, f"`{reference.written(value)}`") in listed, field.name
    assert {f"### {method}" for method in MODELS} <= set(reference.configuration().splitlines())
    assert {"split.validation", "features.<name>.patches", "<name>", "title", "min_sharpness"} <= {
        key for key, *_ in rows
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_are_configurations(page: Path) -> None:
    """But for those that begin with a space: parts of a larger one."""
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
    minimal: dict[str, Any] = {"cohorts": {"a": {"sheet": "a.csv"}}, "datasets": {}, "experiments": {}}
    for code in blocks(page.read_text(encoding="utf-8"), "yaml"):
        if not code.startswith(" "):
            assert list(schema_problems(minimal | yaml.safe_load(code), schema, schema)) == []


def test_no_description_of_the_schema_is_cut_at_a_comma() -> None:
    """In YAML's braces a comma ends an unquoted text: what follows is a key without a value."""

    def stray(node: Any) -> list[str]:
        if not isinstance(node, dict):
            return [key for child in node for key in stray(child)] if isinstance(node, list) else []
        return [key for key, value in node.items() if value is None and key != "default"] + stray(list(node.values()))

    assert stray(yaml.safe_load("{a: {description: Half, cut}}")) == ["cut"]
    assert stray(yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())) == []


def test_the_citation_is_of_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == slidestore.__version__
