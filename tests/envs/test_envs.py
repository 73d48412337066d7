"""envs/*.yaml are valid, pinned, in step with each other, with pyproject.toml and with what the code imports."""

from __future__ import annotations

import ast
import hashlib
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.envs.files import BUILD_TOOLS, CONDA_NAMES, FILES, PYPI_NAMES, ROOT, read

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = {
    requirement.name: requirement.specifier
    for requirement in map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["cuda"])
}
# Imported, and brought by another package: pytorch's CUDA builds bring triton, numba brings llvmlite.
BROUGHT = {"triton", "llvmlite"}


def imports(*packages: str) -> set[str]:
    """Top-level names of everything that a package imports anywhere, the standard library's and our own left out."""
    names = set()
    for path in (path for package in packages for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"gmmamba", "preprocessing", "slidestore"} - BROUGHT


@pytest.mark.parametrize("name", FILES)
def test_files_are_valid_and_every_package_is_pinned(name: str) -> None:
    file = read(name)
    assert file.channels[0] == "conda-forge"
    assert file.channels[-1] == "nodefaults"
    for requirement in file.pip:
        assert str(requirement.specifier).startswith("=="), requirement


def test_no_file_but_these() -> None:
    assert {path.stem for path in (ROOT / "envs").glob("*.yaml")} == set(FILES)


def test_pins_are_the_same_in_every_file() -> None:
    pins: dict[str, set[str]] = {}
    for file in map(read, FILES):
        for name, pin in file.pins.items():
            pins.setdefault(PYPI_NAMES.get(name, name), set()).add(pin)
    assert {name: sorted(versions) for name, versions in pins.items() if len(versions) > 1} == {}


@pytest.mark.parametrize("name", FILES)
def test_pins_are_within_the_ranges_of_pyproject(name: str) -> None:
    file = read(name)
    assert file.pins["python"] in SpecifierSet(PROJECT["requires-python"])
    for requirement in file.pypi_requirements():
        pin = str(requirement.specifier).strip("=").removesuffix(".*")
        assert requirement.name in RANGES, f"envs/{name}.yaml: {requirement.name} is not in pyproject.toml"
        assert pin in RANGES[requirement.name], f"envs/{name}.yaml: {requirement}, not {RANGES[requirement.name]}"


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("preprocessing", ("preprocessing", "slidestore")),
        ("gmmamba", ("gmmamba", "slidestore")),
        ("gmmamba-cuda", ("gmmamba", "slidestore")),
    ],
)
def test_every_import_is_provided(name: str, packages: tuple[str, ...]) -> None:
    file = read(name)
    distributions = {module: canonicalize_name(names[0]) for module, names in packages_distributions().items()}
    needed = {distributions.get(module, canonicalize_name(module)) for module in imports(*packages)}
    needed.discard("anndata")  # no stage exports: who does by hand takes the extra
    if "gmmamba" in packages:
        needed.discard("openslide-python")  # for `view`, which is no stage: it runs where Snakemake does
    if name != "gmmamba-cuda":
        needed.discard("mamba-ssm")  # who names `scan: mamba_ssm` takes the CUDA file
    assert needed - {requirement.name for requirement in file.pypi_requirements()} == set()


def test_the_tables_name_nothing_that_is_gone() -> None:
    names = {name for file in map(read, FILES) for name in file.pins}
    assert set(CONDA_NAMES.values()) | BUILD_TOOLS <= names


@pytest.mark.parametrize("name", ["preprocessing", "gmmamba"])
def test_the_container_is_made_of_these_files(name: str) -> None:
    """Snakemake looks for an environment in the image by its file's digest."""
    content = (ROOT / "envs" / f"{name}.yaml").read_bytes()
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    definition = (ROOT / "envs" / "gmmamba.def").read_text()
    assert f"envs/{name}.yaml /conda-envs/{digest}/environment.yaml" in definition, "see docs/environments.md"
    assert all(f"#   {line}" in definition for line in content.decode().splitlines())


@pytest.mark.network
def test_pins_resolve_together_on_pypi(tmp_path: Path) -> None:
    """What conda-forge's packages are built from fits together, by the metadata that PyPI has of it."""
    if not (uv := shutil.which("uv")):
        pytest.skip("needs uv on the PATH")
    requirements = {str(requirement) for file in map(read, FILES) for requirement in file.pypi_requirements()}
    (tmp_path / "pins.in").write_text("\n".join(sorted(requirements)) + "\n")
    python = read("gmmamba").pins["python"]
    command = [uv, "pip", "compile", "--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    run = subprocess.run([*command, tmp_path / "pins.in"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
