"""What stands in the pages for people, for tests that run it: examples and commands."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^( *)(`{3,})(\w*)\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
"""A block of code: how far it is indented, the fence, its language, the code."""
PROGRAMS = "gmmamba|snakemake|python|make|pytest|uv|conda|apptainer|git|pip|pipx|pre-commit|squeue|sinfo|ssh|py-spy"


def code_blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language in docs/{page}."""
    return blocks((DOCS / page).read_text(encoding="utf-8"), language)


def blocks(text: str, language: str) -> list[str]:
    """The same of a text; blocks of a list, which are indented, as if they were not."""
    found = FENCE.findall(text)
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, _, name, code in found if name == language]


@dataclass(frozen=True)
class Snippet:
    """A block of sh, or a command in a line, which may be a mention only: `gmmamba train`."""

    page: str
    text: str
    block: bool

    def commands(self) -> list[list[str]]:
        """Its words, command by command, without settings of the environment, folders of programs and redirections."""
        found: list[list[str]] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            found.append([])
            for word in lexer:
                if set(word) <= set("();&|"):
                    found.append([])
                elif found[-1] or not re.match(r"\w+=", word):
                    found[-1].append(word)
        commands = [words[: words.index(">")] if ">" in words else words for words in found]
        return [[re.sub(r"^\S*bin/", "", words[0]), *words[1:]] for words in commands if words]


def snippets() -> list[Snippet]:
    """Every one of README, CONTRIBUTING and docs/, page by page, in order."""
    found = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        name = page.relative_to(ROOT).as_posix()
        for part in re.finditer(FENCE.pattern + r"|`([^`\n]+)`", text, FENCE.flags):
            if part[3] == "sh":
                found.append(Snippet(name, part[4], block=True))
            elif part[5] and re.match(rf"(\w+=\S* )*(\S*bin/)?({PROGRAMS}) |\.ci/run", part[5]):
                found.append(Snippet(name, part[5], block=False))
    return found
