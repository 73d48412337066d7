"""The files of envs/, read; and the names that conda-forge and PyPI give to the same package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from rattler import MatchSpec

ROOT = Path(__file__).parents[2]
FILES = ("preprocessing", "gmmamba", "gmmamba-cuda", "snakemake")
CONDA_NAMES = {  # PyPI's name -> conda-forge's, where they differ
    "torch": "pytorch",
    "opencv-python-headless": "py-opencv",
    "openslide-bin": "openslide",
    "matplotlib": "matplotlib-base",
    "snakemake": "snakemake-minimal",
}
PYPI_NAMES = {conda: pypi for pypi, conda in CONDA_NAMES.items()} | {"pytorch-gpu": "torch"}
BUILD_TOOLS = {  # in the CUDA file alone, to compile mamba-ssm: their versions are no result's
    "cuda-version", "cuda-nvcc", "cuda-libraries-dev", "cxx-compiler", "ninja", "setuptools", "packaging", "pip",
}  # fmt: skip


@dataclass(frozen=True)
class EnvironmentFile:
    """`pins`: conda's package name -> the version after `=`; every release that begins with it fits."""

    channels: list[str]
    pins: dict[str, str]
    pip: list[Requirement]

    def pypi_requirements(self) -> list[Requirement]:
        """The same packages as PyPI has them; python and the build tools left out."""
        names = {PYPI_NAMES.get(name, name): pin for name, pin in self.pins.items() if name not in BUILD_TOOLS}
        del names["python"]
        return [Requirement(f"{name}=={pin}.*") for name, pin in names.items()] + self.pip


def read(name: str) -> EnvironmentFile:
    """envs/{name}.yaml. Raises ValueError, or rattler's InvalidMatchSpecError, where conda would not understand it."""
    content = yaml.safe_load((ROOT / "envs" / f"{name}.yaml").read_text())
    if set(content) != {"channels", "dependencies"}:
        raise ValueError(f"envs/{name}.yaml has the keys {sorted(content)}, expected channels and dependencies")
    pins, pip = {}, []
    for line in content["dependencies"]:
        if isinstance(line, dict):
            pip += [Requirement(requirement) for requirement in line["pip"]]
            continue
        spec = MatchSpec(line, strict=True)
        version = str(spec.version)
        if not version.endswith(".*") or "=" not in line:
            raise ValueError(f"envs/{name}.yaml: {line!r} is not pinned, expected 'name =version'")
        pins[line.split()[0]] = version.removesuffix(".*")
    return EnvironmentFile(content["channels"], pins, pip)
