"""Writes the pages of the site: `python docs/site/pages.py FOLDER`, as `make docs` does.

The site is the repository: its Markdown pages at their own places, beside them the generated reference, and a page for
every file or folder that one of them links to. So a link leads to the same thing here and where the repository itself
is looked at, and the site needs no host to link back to.
"""

import json
import posixpath
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from reference import ROOT, pages

LINK = re.compile(r"(^( *`{3,}).*?^\2|`[^`\n]+`)|(?<=\]\()([^)\s#:]+)(?=[)#])", re.DOTALL | re.MULTILINE)
AS_THEY_ARE = (".jpg", ".png", ".svg", ".css")
LANGUAGES = {".smk": "python", ".j2": "html", ".cff": "yaml", "": "text"}


def write_pages(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    texts = pages()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("config/*.md"), *ROOT.glob("docs/**/*.md")]:
        texts[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    waiting = list(texts)
    while waiting:
        page = waiting.pop()
        for name in linked(page, texts[page]):
            if page_of(name) not in texts:
                texts[page_of(name)] = source(name)
                waiting.append(page_of(name))
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text(LINK.sub(partial(to_page, page), texts[page]), encoding="utf-8")
    for path in (ROOT / "docs").rglob("*"):
        if path.suffix in AS_THEY_ARE:
            (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))


def linked(page: str, text: str) -> list[str]:
    """Files and folders of the repository, neither pages nor pictures, that the page links to."""
    links = [found[3] for found in LINK.finditer(text) if found[3]]
    names = [posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in links]
    return [name for name in names if (ROOT / name).exists() and not name.endswith((".md", *AS_THEY_ARE))]


def page_of(name: str) -> str:
    if (ROOT / name).is_dir():
        return f"{name}/README.md" if (ROOT / name / "README.md").is_file() else f"{name}/index.md"
    return f"{name}.md"


def to_page(page: str, found: re.Match[str]) -> str:
    """The link, to the page of what it named; code as it is."""
    names = linked(page, f"]({found[3]})") if found[3] else []
    return posixpath.relpath(page_of(names[0]), posixpath.dirname(page) or ".") if names else found[0]


def source(name: str) -> str:
    """The page of a file, in full, of a notebook, or of a folder, a list of its files."""
    path = ROOT / name
    head = f"---\nsearch:\n  exclude: true\n---\n\n# `{name}`\n\n"
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
        return head + "\n".join(f"- [{file}]({file})" for file in names) + "\n"
    if path.suffix == ".ipynb":
        return notebook(json.loads(path.read_text(encoding="utf-8"))["cells"])
    language = LANGUAGES.get(path.suffix, path.suffix[1:])
    return f"{head}````````{language}\n{path.read_text(encoding='utf-8')}\n````````\n"


def notebook(cells: list[dict[str, Any]]) -> str:
    """Its text and code."""
    texts = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for text, kind in texts) + "\n"


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
