"""Which code a stage's result depends on, as a digest for Snakemake's params.

Snakemake notices a changed shell command, not a changed module behind it. The digest covers a stage's module and every
module of this project that it imports, without comments, docstrings and layout: those change no result.
`__init__` files are followed, not counted, so that a new model in the registry reruns nothing.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("gmmamba", "preprocessing", "slidestore")


def code_digest(*modules: str, files: tuple[Path, ...] = (), root: Path = ROOT) -> str:
    """Twelve hex digits for the code of `modules` (dotted names), what they import, and further `files`."""
    found: set[Path] = set()
    waiting = [_source(root, name) for name in modules]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        waiting += [_source(root, name) for name in _imports(path, root)]
    sha = hashlib.sha256()
    for path in sorted(found):
        if path.name != "__init__.py":
            sha.update(_code(path).encode())
    for path in files:
        sha.update(path.read_bytes())
    return sha.hexdigest()[:12]


def file_digest(path: Path) -> str:
    """Twelve hex digits for the code of one Python file, which need not be of this project."""
    return hashlib.sha256(_code(path).encode()).hexdigest()[:12]


def _source(root: Path, name: str) -> Path:
    base = root.joinpath(*name.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


@cache
def _imports(path: Path, root: Path) -> list[str]:
    return list(_project_imports(ast.parse(path.read_text()), root))


def _project_imports(tree: ast.AST, root: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from package import module` names a module, `from package.module import thing` does not.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.split(".")[0] in PACKAGES and _source(root, name).is_file():
                yield name


@cache
def _code(path: Path) -> str:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
