"""The house rules that a machine can hold: import directions, light imports, file sizes."""

import ast
import subprocess
import sys
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
    for package in FORBIDDEN:
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path
