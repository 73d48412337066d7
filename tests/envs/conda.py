"""A `conda` for tests, where there is neither conda nor conda-forge: rattler's solver, installer and activation, on a
local channel whose packages are links to what is installed in the Python that runs the tests.

It answers what Snakemake asks of conda: `conda --version`, `conda info --json`, `conda config --get channel_priority
--json`, `conda env create --file F --prefix P`, `conda clean --tarballs`, and `source BASE/bin/activate P`. An
environment holds its file's packages and what these depend on, nothing else: a job that imports more fails.

What is not tried: conda itself, the files that conda-forge's packages hold, and their own dependencies.
"""

from __future__ import annotations

import argparse
import asyncio
import bz2
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import defaultdict
from importlib.metadata import Distribution, distributions
from pathlib import Path

import rattler
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rattler.index import index_fs
from rattler.platform import Subdir
from rattler.shell import ActivationVariables, Shell, activate

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
# Runs when an environment's Python starts: who runs what is written to the file that the environment variable names.
SITECUSTOMIZE = """
import os, sys
if log := os.environ.get("RECORD_PYTHON"):
    with open(log, "a") as file:
        print(sys.prefix, *sys.orig_argv, sep="\\t", file=file)
"""


# The channel ---------------------------------------------------------------------------------------------------------


def build_channels(folder: Path, pins: dict[str, str], conda_names: dict[str, str]) -> None:
    """Write folder/conda-forge and folder/bioconda: every installed distribution as a package of its conda name.

    pins: versions by conda name, instead of the installed version. Dependencies are the distribution's own, without
    their versions: which versions fit together is another test's question.
    """
    installed = {canonicalize_name(d.metadata["Name"]): d for d in distributions()}
    installed.pop("gmmamba", None)  # jobs take it from the checkout
    links = _links(installed)
    for name, distribution in installed.items():
        conda_name = conda_names.get(name, name)
        depends = [conda_names.get(dependency, dependency) for dependency in sorted(_dependencies(name, installed))]
        channel = folder / ("bioconda" if conda_name.startswith("snakemake") else "conda-forge")
        version = pins.get(conda_name, distribution.version)
        _write_package(channel, conda_name, version, ["python", *depends], links[name])
    python: dict[str, str | Path] = {
        "bin/python": Path(os.path.realpath(sys.executable)),
        "pyvenv.cfg": f"home = {Path(os.path.realpath(sys.executable)).parent}\n",
        f"{SITE}/sitecustomize.py": SITECUSTOMIZE,
    }
    _write_package(folder / "conda-forge", "python", pins["python"], [], python)
    for channel in folder.iterdir():
        (channel / "noarch").mkdir()  # conda's clients ask for it
        subprocess.run([sys.executable, __file__, "index", channel], check=True)


def _dependencies(name: str, installed: dict[str, Distribution], extra: str = "") -> set[str]:
    """What a distribution needs of what is installed; with the name of an extra, what that adds."""
    names = set()
    for requirement in map(Requirement, installed[name].requires or []):
        needed = canonicalize_name(requirement.name)
        if needed in installed and (requirement.marker is None or requirement.marker.evaluate({"extra": extra})):
            names |= {needed}.union(*(_dependencies(needed, installed, each) for each in requirement.extras))
    return names


def _links(installed: dict[str, Distribution]) -> dict[str, dict[str, str | Path]]:
    """For each distribution the shortest paths below site-packages that are its alone, and where they lead."""
    owners = defaultdict(set)
    files = {name: [f for f in d.files or [] if ".." not in f.parts] for name, d in installed.items()}
    for name, paths in files.items():
        for path in paths:
            for part in (path, *path.parents):
                owners[str(part)].add(name)
    links: dict[str, dict[str, str | Path]] = {name: {} for name in installed}
    for name, paths in files.items():
        for path in paths:
            own = next(str(p) for p in (*reversed(path.parents), path) if owners[str(p)] == {name} or p == path)
            links[name][f"{SITE}/{own}"] = Path(str(installed[name].locate_file(own)))
    return links


def _write_package(channel: Path, name: str, version: str, depends: list[str], contents: dict[str, str | Path]) -> None:
    """Write a .tar.bz2 package. contents: path in the environment -> text of the file, or the path it links to."""
    subdir = str(Subdir.current())
    index = {"name": name, "version": version, "build": "0", "build_number": 0, "depends": depends, "subdir": subdir}
    paths = [
        {"_path": path, "path_type": "softlink" if isinstance(content, Path) else "hardlink"}
        for path, content in contents.items()
    ]
    texts = {"info/index.json": json.dumps(index), "info/paths.json": json.dumps({"paths": paths, "paths_version": 1})}
    file = channel / subdir / f"{name}-{version}-0.tar.bz2"
    file.parent.mkdir(parents=True, exist_ok=True)
    with bz2.open(file, "wb", compresslevel=1) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for path, content in (texts | contents).items():
            info = tarfile.TarInfo(path)
            info.mode = 0o644
            if isinstance(content, Path):
                info.type, info.linkname = tarfile.SYMTYPE, str(content)
                tar.addfile(info)
            else:
                info.size = len(content.encode())
                tar.addfile(info, io.BytesIO(content.encode()))


# The command ---------------------------------------------------------------------------------------------------------


def install_conda(base: Path, channels: Path) -> Path:
    """Write base/bin/conda and base/bin/activate, to be put on the PATH; returns base/bin."""
    (base / "bin").mkdir(parents=True)
    command = base / "bin" / "conda"
    command.write_text(
        f"#!/bin/sh\nexport CONDA_ROOT='{base}' CONDA_CHANNEL_ALIAS='{channels.as_uri()}/'\n"
        f'exec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n'
    )
    command.chmod(0o755)
    (base / "bin" / "activate").write_text(f'eval "$("{command}" shell-activate "$1")"\n')
    return base / "bin"


def create(file: Path, prefix: Path) -> None:
    """Solve an environment file with strict channel priority and install it."""
    content = yaml.safe_load(file.read_text())
    configuration = rattler.ChannelConfig(os.environ["CONDA_CHANNEL_ALIAS"])
    channels = [rattler.Channel(name, configuration) for name in content["channels"] if name != "nodefaults"]
    specs = [rattler.MatchSpec(line, strict=True) for line in content["dependencies"]]

    async def solve_and_install() -> None:
        cache = Path(os.environ["CONDA_ROOT"], "pkgs")
        gateway = rattler.Gateway(cache_dir=cache / "cache", show_progress=False)
        records = await rattler.solve(
            channels, specs, gateway=gateway, channel_priority=rattler.ChannelPriority.Strict, virtual_packages=[]
        )
        await rattler.install(records, prefix, cache_dir=cache, show_progress=False)

    asyncio.run(solve_and_install())


def main() -> None:
    arguments = sys.argv[1:]
    match arguments:
        case ["--version"]:
            print("conda 24.7.1")
        case ["info", "--json"]:
            print(json.dumps({"conda_prefix": os.environ["CONDA_ROOT"], "platform": str(Subdir.current())}))
        case ["config", "--get", "channel_priority", "--json"]:
            print(json.dumps({"get": {"channel_priority": "strict"}}))
        case ["env", "create", *options]:
            parser = argparse.ArgumentParser()
            parser.add_argument("--quiet", action="store_true")
            parser.add_argument("--no-default-packages", action="store_true")
            parser.add_argument("--file", type=Path, required=True)
            parser.add_argument("--prefix", type=Path, required=True)
            parsed = parser.parse_args(options)
            create(parsed.file, parsed.prefix)
        case ["clean", "-y", "--tarballs"]:
            for tarball in Path(os.environ["CONDA_ROOT"], "pkgs").glob("*.tar.bz2"):
                tarball.unlink()
        case ["index", channel]:
            asyncio.run(index_fs(channel))
        case ["shell-activate", prefix]:
            print(activate(Path(prefix), ActivationVariables(), Shell.bash).script)
        case _:
            sys.exit(f"the tests' conda does not know: conda {' '.join(arguments)}")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # rattler 0.28's threads crash now and then while the interpreter shuts down
