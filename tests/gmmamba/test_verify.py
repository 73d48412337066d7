"""The replay of reference cases: everything shipped passes, and what is wrong is seen."""

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gmmamba.verify import ADAPTERS, verify


@pytest.fixture
def one_case(shared: Path, tmp_path: Path) -> Path:
    """A folder of the published form with one small case in it."""
    source = shared / "reference" / "gmmamba"
    for file in source.glob("t02_*"):
        shutil.copyfile(file, tmp_path / file.name)
    manifest = {"t02": json.loads((source / "manifest.json").read_text())["t02"]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def edit(file: Path, key: str, factor: float) -> None:
    arrays = dict(np.load(file))
    arrays[key] = arrays[key] * factor
    np.savez(file, **arrays)


def test_all_reference_cases_of_gmmamba(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(shared / "reference" / "gmmamba"), capsys.readouterr().out


def test_the_readable_scan_passes_too(one_case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(one_case, scan="torch"), capsys.readouterr().out


def test_baselines_that_are_built_pass(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every case of every method that has an adapter."""
    passed = verify(shared / "reference" / "baselines")
    printed = capsys.readouterr().out
    assert passed, printed
    cases = {index.parent.name: json.loads(index.read_text())["cases"] for index in shared.rglob("*/index.json")}
    for case in itertools.chain(*(cases[method] for method in ADAPTERS)):
        assert f"  {Path(case['file']).stem}: ok" in printed


def test_methods_and_flavours_that_are_not_built_are_listed(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared / "reference" / "baselines" / "clam"
    index = json.loads((folder / "index.json").read_text())
    write_cases(tmp_path / "a", index | {"method": "clan"}, [])
    other = next(case for case in index["cases"] if case["D"]) | {"variant": "clam_xl"}
    write_cases(tmp_path / "b", index | {"cases": [other]}, [np.load(folder / other["file"])])
    assert verify(tmp_path)
    printed = capsys.readouterr().out
    assert "clan, 17 cases: not implemented" in printed
    assert f"{Path(other['file']).stem}: not implemented" in printed


def write_cases(folder: Path, index: dict[str, Any], arrays: Sequence[Mapping[str, np.ndarray]]) -> None:
    """`arrays`: of each case in `index`, in its order."""
    folder.mkdir()
    (folder / "index.json").write_text(json.dumps(index))
    for case, content in zip(index["cases"], arrays, strict=False):
        np.savez(folder / case["file"], **content)


@pytest.mark.parametrize("method", ["clam", "dsmil", "dtfd", "ibmil", "ilra", "acmil"])
def test_every_wrong_number_of_a_baseline_is_seen(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """Of one case a variant, copies in each of which one array, or the gradient norms, are off."""
    folder = shared / "reference" / "baselines" / method
    index = json.loads((folder / "index.json").read_text())
    of_variant = {case["variant"]: case for case in index["cases"]}
    wrong, arrays = [], []
    for variant, case in of_variant.items():
        content = dict(np.load(folder / case["file"]))
        inputs = {"perm", "uniforms", "y_label", "scores2", "y2", "scores3", "y3"}
        for key in set(content) - inputs:
            off = ~content[key] if content[key].dtype == bool else content[key] + 1
            wrong.append(case | {"file": f"{variant}-{key}.npz"})
            arrays.append(content | {key: off})
        for key in {key for key in case if key.endswith("grad_norms")}:
            norms = {name: 1.1 * norm for name, norm in case[key].items()}
            wrong.append(case | {"file": f"{variant}-{key}.npz", key: norms})
            arrays.append(content)
    write_cases(tmp_path / method, index | {"cases": wrong}, arrays)
    assert not verify(tmp_path)
    printed = capsys.readouterr().out
    assert [case["file"] for case in wrong if f"  {Path(case['file']).stem}: OUT OF TOLERANCE" not in printed] == []


@pytest.mark.parametrize(
    ("part", "key", "factor"),
    [
        ("outputs", "logits", 1.001),
        ("outputs", "grad/imm.norm.weight", 1.001),
        ("outputs", "h2", np.nan),
        ("outputs", "keep", 0),
        ("inputs", "coords", 0),
    ],
)
def test_a_wrong_number_is_seen(
    one_case: Path, capsys: pytest.CaptureFixture[str], part: str, key: str, factor: float
) -> None:
    edit(one_case / f"t02_{part}.npz", key, factor)
    assert not verify(one_case)
    printed = capsys.readouterr().out
    assert "OUT OF TOLERANCE" in printed
    wrong = {"grad/imm.norm.weight": "grad", "coords": "kmeans"}.get(key, key)
    assert any(
        item.startswith(wrong + " ") and "!" in item for item in printed.replace("TOLERANCE  ", ", ").split(", ")
    )


def test_a_quantity_that_ours_lacks_is_seen(one_case: Path) -> None:
    file = one_case / "t02_outputs.npz"
    np.savez(file, **dict(np.load(file)), something_new=np.ones(3))
    assert not verify(one_case)


def test_a_gradient_norm_is_compared(one_case: Path) -> None:
    manifest = json.loads((one_case / "manifest.json").read_text())
    manifest["t02"]["grad_norms_fp64"]["cls.fc2.bias"] *= 1 + 1e-9
    (one_case / "manifest.json").write_text(json.dumps(manifest))
    assert not verify(one_case)


def test_a_folder_without_cases_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no reference cases"):
        verify(tmp_path)


def test_a_foreign_manifest_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match="is no manifest of reference cases: 'version'"):
        verify(tmp_path)
