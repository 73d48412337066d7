"""Every command of the pages for people: its options exist; and it runs, or stands below with the reason why not."""

import argparse
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from snakemake.cli import get_argument_parser

import gmmamba.__main__
import preprocessing.__main__
import slidestore.__main__
from tests.docs import ROOT, Snippet, snippets

OTHERS = {
    "apptainer", "build", "cd", "conda", "cp", "gdc-client", "git", "head", "mkdir", "mv", "pip", "pipx", "pre-commit",
    "py-spy", "sed", "sinfo", "source", "squeue", "ssh", "tmux", "uv",
}  # fmt: skip
"""Programs of others: that they have these options is theirs to know."""

NOT_RUN = {
    r"^make (demo|test|lint|docs)(?!-slurm)|^\.ci/run|^make \.venv/installed|^gmmamba demo": "CI itself does it",
    r"^make (bench|test-slurm)|python -m benchmarks\.": "hours, or a machine of its own",
    r"pytest ": "tests by hand, or part of `make test`",
    r"make_tile_cohort|results-methods|run/results/tiles|unseen": "hours, on cohorts that no part of the project draws",
    r"verify ": "reference cases, which are no part of the project: tests/gmmamba/test_verify.py",
    r"gdc-client|^git|^pip|python -m build|pre-commit": "a network",
    r"slurm|squeue|sinfo|^ssh": "a cluster: tests/cluster has one",
    r"--use-conda|--sdm|--containerize|^uv ": "conda or apptainer: tests/envs has stand-ins",
    r"CUDA_VISIBLE_DEVICES|py-spy": "several GPUs; a profiler",
}
PLANNED = r"(snakemake|gmmamba run) .*(table_|predict_new|--configfile|myproject)"
"""Runs of hours, of which Snakemake only makes the plan here."""
INSTEAD = {
    "--cores 16": "--cores 2", "--threads 8": "--threads 2", '"pretrained"': '"random"', "--mpp 0.25": "--mpp 0.5",
    "FOLDER": "incoming", "../shared/data/slides/FILE": "incoming/new.tif",
    "SLIDES": "slides", "dataset_csv/my.csv": "tcga_brca_acmil.csv",
}  # fmt: skip
"""What the test has for what a page leaves open, or what cannot be had here."""


def reason_not_to_run(snippet: Snippet) -> str | None:
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, snippet.text)), None)


class FoundParser(Exception):  # noqa: N818
    pass


@cache
def parser_of(module: str) -> argparse.ArgumentParser:
    """That of `python -m module`."""
    ours = {"gmmamba": gmmamba.__main__, "preprocessing": preprocessing.__main__, "slidestore": slidestore.__main__}
    if module in ours:
        return ours[module].parser()
    if module == "snakemake":
        return get_argument_parser()

    def found(self: argparse.ArgumentParser, *args: object) -> None:
        raise FoundParser(self)

    with patch("argparse.ArgumentParser.parse_args", found), pytest.raises(FoundParser) as parser:
        importlib.import_module(module).main()
    return parser.value.args[0]


@cache
def lenient(module: str) -> argparse.ArgumentParser:
    """The same for mentions, which leave out what is required."""
    waiting = [parser_of.__wrapped__(module)]
    first = waiting[0]
    while waiting:
        for action in waiting.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += list(action.choices.values())
            elif not action.option_strings and action.nargs is None:
                action.nargs = "?"
            action.required = False
    return first


def complete(snippet: Snippet) -> bool:
    """Whether it can be run as it stands: mentions leave out what is required, or name what the reader has to give."""
    if snippet.block:
        return True
    if re.search(r"[{…]|COMMAND|CHECKOUT", snippet.text):
        return False
    says_how = rf"--cores|-n|--unlock|{PLANNED}"  # what Snakemake wants to know
    if re.search(r"snakemake|gmmamba run", snippet.text) and not re.search(says_how, snippet.text):
        return False
    try:
        check(snippet.commands()[0], parser_of)
    except SystemExit:
        return False
    return True


def check(words: list[str], parser_for=lenient) -> None:
    """SystemExit or AssertionError where the program has no such command, option, target or file."""
    program, *rest = words
    if words[:2] == ["python", "-m"]:
        program, *rest = words[2:]
    if program == "gmmamba" and rest[:1] == ["run"]:  # which hands all options on
        program, *rest = ["snakemake", *rest[1:]]
    if program == "snakemake":
        options = parser_for("snakemake").parse_args([word for word in rest if word != "…"])
        rules = "\n".join(path.read_text() for path in ROOT.glob("workflow/rules/*.smk"))
        names = re.findall(r"^rule (\w+):", rules, re.MULTILINE)
        files = [re.sub(r"\\{\w+\\}", r"[^/]+", re.escape(file)) for file in re.findall(r'"(results/[^"]+)"', rules)]
        tables = [f"table_{name}" for name in yaml.safe_load((ROOT / "config/tables.yaml").read_text())["tables"]]
        known = "|".join([*names, *tables, *files])
        assert all(re.fullmatch(known, target) for target in options.targets), options.targets
        for file in options.configfile or []:
            assert (ROOT / str(file).replace("path/to/gmmamba/", "")).is_file(), file
    elif program == "make":
        targets = re.findall(r"^([^\s:#]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[-1].replace(".venv", "$(VENV)") in targets, rest
    elif program == "pytest":
        for word in rest:
            assert not word.startswith("tests/") or (ROOT / word).exists(), word
    elif program in ("gmmamba", "preprocessing", "slidestore") or program.startswith("benchmarks."):
        if "COMMAND" not in rest:
            parser_for(program).parse_args([re.sub(r"\$\w+|…", "x", word) for word in rest])
    elif program == ".ci/run":
        assert os.access(ROOT / program, os.X_OK)
    else:
        assert program in OTHERS or words[:2] == ["python", "$tool"], f"what is {program}?"


@pytest.mark.parametrize("page", sorted({snippet.page for snippet in snippets()}))
def test_commands_have_the_options_that_they_are_given(page: str) -> None:
    for snippet in snippets():
        for words in snippet.commands() if snippet.page == page else []:
            try:
                check(words, parser_of if snippet.block else lenient)
            except SystemExit as error:
                if error.code != 0:  # as of --help
                    pytest.fail(f"{page}: {shlex.join(words)}: {error.__context__}")


def test_a_wrong_command_is_seen() -> None:
    for wrong in ("gmmamba trian", "gmmamba compare a b --sort", "snakemake table_x", "make demos", "gmmmamba view"):
        with pytest.raises((SystemExit, AssertionError)):
            check(Snippet("", wrong, block=False).commands()[0])


def test_what_is_not_run_is_still_there() -> None:
    for pattern in NOT_RUN:
        assert any(re.search(pattern, snippet.text) for snippet in snippets()), pattern


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the demo ran: fewer slides and epochs. Beside it what the pages take for granted."""
    folder = tmp_path_factory.mktemp("docs") / "gmmamba"
    folder.mkdir()
    for name in ("Snakefile", "workflow", "config", "envs", "gmmamba", "preprocessing", "slidestore", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "path/to").mkdir(parents=True)
    (folder / "path/to/gmmamba").symlink_to(folder)
    run(folder, "python -m preprocessing demo-cohort --out results/demo/cohort --slides 12")
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    config["tiling"]["max_patches"] = 24
    config["datasets"]["demo"]["split"]["folds"] = 2
    config["training"]["epochs"] = config["experiments"]["gmmamba"]["training"]["epochs"] = 6
    config["predictions"] = {"fresh": {"slides": "incoming", "dataset": "demo", "experiment": "gmmamba"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "myproject").mkdir()
    (folder / "myproject/config.yaml").write_text(yaml.safe_dump(config))
    (folder / "myproject/results").symlink_to(folder / "results")
    (folder / "incoming").mkdir()
    slide = sorted((folder / "results/demo/cohort").rglob("*_04.*"))[0]
    (folder / "incoming/new.tif").symlink_to(slide)
    (folder / "myproject/incoming").symlink_to(folder / "incoming")
    run(folder, "snakemake --cores 2 --show-failed-logs")
    for link, target in {"mydata": "demo", "tiles1": "demo", "demo/gmmamba-mydata": "gmmamba"}.items():
        (folder / "results" / link).symlink_to(target)
    for name in ("tiles1", "../tiles1"):
        (folder / name).symlink_to(folder / "results/demo/cohort")
    write_tables(folder)
    write_foreign(folder)
    stem = f"results/demo/tiles/{slide.name.split('.')[0]}"
    job = {"slide": str(slide), "coords": f"{stem}.npy", "record": f"{stem}.json", "output": "encoded.zarr.zip"}
    (folder / "jobs.json").write_text(json.dumps([job]))
    return folder


def write_tables(folder: Path) -> None:
    """Empty files as slides, a label table, and sheets of the paper's cohorts but for the one that a page makes."""
    (folder / "slides").mkdir()
    names = [f"TCGA-A{i % 5}-A{i:03}-01Z-00-DX1.{i:08}" for i in range(60)]
    for name in names:
        (folder / f"slides/{name}.svs").touch()
    labels = [f"{name[:12]},{name},{('IDC', 'ILC')[i % 2]}" for i, name in enumerate(names)]
    (folder / "tcga_brca_acmil.csv").write_text("\n".join(["case_id,slide_id,label", *labels]) + "\n")
    datasets = yaml.safe_load((ROOT / "config/poster.yaml").read_text())["datasets"]
    for dataset in (datasets["tcga-esca"], datasets["tcga-lung"], datasets["bracs"]):
        lines = ["slide_id,patient_id,label,path,mpp,split"]
        for i, name in enumerate(names):
            label = dataset["classes"][i % len(dataset["classes"])]
            part = ("train", "val", "test")[i // len(dataset["classes"]) % 3]
            lines.append(f"{name},{name[:12]},{label},slides/{name}.svs,0.25,{part}")
        (folder / f"{dataset['cohorts'][0]}.csv").write_text("\n".join(lines) + "\n")


def write_foreign(folder: Path) -> None:
    """The demo's features as files of TRIDENT and of CLAM, in their folders; CLAM's folder of splits."""
    stores = "results/demo/features/resnet18-random/*.zarr.zip"
    run(folder, f"python -m slidestore export --format trident-h5 --output out {stores}")
    run(folder, f"python -m slidestore export --format clam --output clam {stores}")
    (folder / "trident/20x").mkdir(parents=True)
    (folder / "out/features_resnet18-random").rename(folder / "trident/20x/features_uni_v1")
    run(folder, "gmmamba splits export results/demo/splits.csv --output splits/task_1")


def run(folder: Path, text: str) -> None:
    """In bash, as the pages' reader would; it must not fail."""
    done = subprocess.run(["bash", "-euc", text], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"


def environment() -> dict[str, str]:
    """With this checkout's code and its environment's programs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    packages = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | {"PATH": path, "PYTHONPATH": packages}


def to_run(snippet: Snippet) -> str:
    """The snippet with what the test has."""
    text = snippet.text
    for words, others in INSTEAD.items():
        text = text.replace(words, others)
    return re.sub(r"\b(snakemake|gmmamba run)\b", r"\1 -n", text, count=1) if re.search(PLANNED, text) else text


@pytest.mark.slow
def test_commands_run(checkout: Path) -> None:
    """Page after page; the same command once."""
    may_run = [snippet for snippet in snippets() if reason_not_to_run(snippet) is None and complete(snippet)]
    texts = dict.fromkeys(to_run(snippet) for snippet in may_run)
    assert len(texts) > 15
    for text in texts:
        (look_at if "gmmamba view" in text else run)(checkout, text)


def look_at(folder: Path, text: str) -> None:
    """A server: it answers where it says, and ends with Ctrl-C."""
    words = [*shlex.split(text, comments=True), "--port", "0"]
    interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the tests run in the background
    server = subprocess.Popen(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True, preexec_fn=interruptible
    )
    try:
        assert server.stdout is not None
        address = re.search(r"http://\S+/", server.stdout.readline())
        assert address is not None
        with urllib.request.urlopen(address[0], timeout=60) as page:
            assert page.status == 200
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    assert server.returncode == 0
