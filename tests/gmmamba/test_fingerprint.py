"""A stage's digest moves with what changes its result, and with nothing else."""

from pathlib import Path

import pytest

from gmmamba.fingerprint import code_digest


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "gmmamba/__init__.py": "",
        "gmmamba/stage.py": '"""Doc."""\nfrom slidestore import reader\nimport numpy\n\ndef run():\n    return 1\n',
        "gmmamba/other.py": "x = 1\n",
        "slidestore/__init__.py": "from slidestore.reader import read\n",
        "slidestore/reader.py": "def read():\n    return 2\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def moved(tree: Path, name: str, text: str) -> bool:
    """Whether the digest of gmmamba.stage differs when one file is another (in a copy: results are cached by path)."""
    before = code_digest("gmmamba.stage", root=tree)
    other = tree.with_name(f"{tree.name}_other")
    for file in tree.rglob("*.py"):
        target = other / file.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text if str(file.relative_to(tree)) == name else file.read_text())
    return before != code_digest("gmmamba.stage", root=other)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gmmamba/stage.py", "'''Other doc.'''\nfrom slidestore import reader\nimport numpy\n# note\n\n\ndef run():\n"
         "    'what it does'\n    return 1  # one\n", False),
        ("gmmamba/stage.py", "from slidestore import reader\nimport numpy\ndef run():\n    return 3\n", True),
        ("slidestore/reader.py", "def read():\n    return 4\n", True),
        ("slidestore/__init__.py", "from slidestore.reader import read\nx = 1\n", False),
        ("gmmamba/other.py", "x = 2\n", False),
    ],
)  # fmt: skip
def test_digest(tree: Path, name: str, text: str, expected: bool) -> None:
    assert moved(tree, name, text) is expected
