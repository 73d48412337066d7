"""The house rules that a machine can hold: import directions, light imports, file sizes."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "slidestore": {"gmmamba", "preprocessing", "benchmarks"},
    "preprocessing": {"gmmamba", "benchmarks"},
    "gmmamba": {"preprocessing", "benchmarks"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_data_flows_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert not imported(path) & FORBIDDEN[package], path


@pytest.mark.parametrize(
    "module",
    [
        "gmmamba.config",
        "gmmamba.models",
        "gmmamba.fingerprint",
        "gmmamba.accounting",
        "gmmamba.contact_sheet",
        "gmmamba.sheets",
        "preprocessing.imported",
        "preprocessing.tile",
        "slidestore.export",
        "slidestore.foreign",
    ],
)
def test_what_needs_no_torch_does_not_import_it(module: str) -> None:
    """Importing torch takes seconds, and a pipeline is thousands of jobs."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_planning_needs_no_more_than_snakemake_s_own_environment_has() -> None:
    """envs/snakemake.yaml: what the rules import of ours must load there."""
    absent = "torch torchvision timm zarr h5py numba openslide cv2 shapely tifffile PIL matplotlib jinja2 tqdm"
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {set(absent.split())!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import gmmamba.config, gmmamba.fingerprint, gmmamba.models, gmmamba.table_rows
import slidestore.settings, slidestore.warm_start
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_file_is_too_long_to_read_in_one_sitting() -> None:
    """Code of any kind; not the schema, which is looked up key by key, nor the viewer's OpenSeadragon."""
    code = {".py", ".smk", ".j2", ".js", ".css", ".html"}
    for folder in (*FORBIDDEN, "benchmarks", "tests", "workflow"):
        for path in (path for path in (ROOT / folder).rglob("*") if path.suffix in code):
            if "openseadragon" not in path.parts:
                assert len(path.read_text().splitlines()) <= 400, path


def test_no_module_needs_one_that_needs_it() -> None:
    """Each can be read after those that it imports. What is imported inside a function counts, too; a package's face,
    `__init__`, and its command line, `__main__`, do not: they name what is below them."""
    graph = {module: modules for package in FORBIDDEN for module, modules in imports_of(package).items()}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def imports_of(package: str) -> dict[str, set[str]]:
    """Module -> modules of the project."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        if path.stem not in ("__init__", "__main__"):
            names = set()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            files = {name: ROOT / Path(*name.split(".")).with_suffix(".py") for name in names}
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[module] = {name for name, file in files.items() if file.is_file()}
    return found
