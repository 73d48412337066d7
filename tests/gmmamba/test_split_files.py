"""Splits that people edit: read, written in CLAM's form and back, and checked."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmmamba.__main__ import main
from gmmamba.config import ConfigError, load_config
from gmmamba.split_files import PARTS, SplitError, read_clam, read_own, write_clam, write_own
from gmmamba.splits import SplitSettings, split_dataset
from tests.gmmamba.configs import good_config, write_sheet

CLASSES = ["normal", "tumour"]


@given(st.lists(st.lists(st.sampled_from(["", *PARTS]), min_size=3, max_size=3), min_size=2, max_size=12))
@settings(deadline=None, max_examples=30)
def test_clams_form_says_the_same(tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]]) -> None:
    folder = tmp_path_factory.mktemp("splits")
    table = pd.DataFrame(cells, columns=["fold0", "fold1", "fold2"])
    table.index = pd.Index([f"{i:03d}" for i in range(len(table))], name="slide_id")  # leading zeros stay
    write_own(table, folder / "own.csv")
    pd.testing.assert_frame_equal(read_own(folder / "own.csv"), table)
    write_clam(table, folder / "clam")
    somewhere = table[(table != "").any(axis=1)]
    assert read_clam(folder / "clam").to_dict() == somewhere.to_dict()


def test_clams_own_files_are_read(tmp_path: Path) -> None:
    """As CLAM's create_splits_seq.py writes them: an index, and columns that are filled up with nothing."""
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,S0,S2,S3\n1,12.0,,\n")
    (tmp_path / "splits_0_bool.csv").write_text(",train,val,test\nS0,True,False,False\n")
    (tmp_path / "splits_0_descriptor.csv").write_text(",train,val,test\nnormal,1,1,1\n")
    table = read_clam(tmp_path)
    assert table["fold0"].to_dict() == {"S0": "train", "12": "train", "S2": "val", "S3": "test"}
    assert main(["splits", "import", str(tmp_path), "--output", str(tmp_path / "own.csv")]) == 0
    assert read_own(tmp_path / "own.csv")["fold0"].to_dict() == table["fold0"].to_dict()
    assert main(["splits", "export", str(tmp_path / "own.csv"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "splits_0.csv").read_text().startswith(",train,val,test\n0,S0,S2,S3\n")
    assert main(["splits", "import", str(tmp_path / "nowhere"), "--output", str(tmp_path / "x.csv")]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,fold0\nS0,tset\n", "line 2: fold0 is 'tset', none of train, val, test or empty"),
        ("slide_id,fold0\nS0,train\nS0,test\n", "slide S0 stands there twice"),
        ("slide,fold0\nS0,train\n", "must have the columns slide_id, fold0"),
        ("slide_id,fold0,fold2\nS0,train,val\n", "without a gap; it has slide_id, fold0, fold2"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(SplitError, match=message):
        read_own(tmp_path / "own.csv")


def test_folders_that_are_not_clams_are_refused(tmp_path: Path) -> None:
    (tmp_path / "splits_1.csv").write_text(",train,val,test\n0,S0,S1,S2\n")
    with pytest.raises(SplitError, match=r"splits_0.csv, splits_1.csv, ... without a gap; it has splits_1.csv"):
        read_clam(tmp_path)
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,S0,S1,S0\n")
    with pytest.raises(SplitError, match="slide S0 stands in train and in test"):
        read_clam(tmp_path)


def parts_of(i: int) -> str:
    return PARTS[i // 2 % 3]


def configured(tmp_path: Path, rows: list[str], header: str = "slide_id,fold0,fold1", **split: Any) -> dict[str, Any]:
    """The configuration of twelve patients, whose split is a file of these rows; S11 is excluded."""
    slides = [f"S{i},P{i},{CLASSES[i % 2]},s{i}.svs,{'blurred' if i == 11 else ''}" for i in range(12)]
    slides.append("S5b,P5,tumour,s5b.svs,")
    config = good_config(write_sheet(tmp_path, slides, "slide_id,patient_id,label,path,exclude"))
    path = tmp_path / "own.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    config["datasets"]["demo"]["split"] = {"scheme": "file", "path": str(path), **split}
    return config


GOOD = [*(f"S{i},{parts_of(i)},{parts_of(i + 2)}" for i in range(12)), f"S5b,{parts_of(5)},{parts_of(7)}"]


def test_a_file_is_the_split_and_says_how_many_folds(tmp_path: Path) -> None:
    config = load_config(configured(tmp_path, GOOD))
    assert config.datasets["demo"].folds == [0, 1]
    slides = pd.DataFrame([row.split(",") for row in GOOD], columns=["slide_id", "fold0", "fold1"])
    slides["patient_id"] = ["P" + name[1:].rstrip("b") for name in slides["slide_id"]]
    slides["label"] = [CLASSES[int(name[1:]) % 2] for name in slides["patient_id"]]
    slides["status"] = ["excluded" if name == "S11" else "ready" for name in slides["slide_id"]]
    slides.drop(columns=["fold0", "fold1"]).to_csv(tmp_path / "table.csv", index=False)
    split = config.datasets["demo"].split
    split_dataset({"demo": tmp_path / "table.csv"}, CLASSES, split, tmp_path / "splits.csv")
    written = pd.read_csv(tmp_path / "splits.csv", dtype=str, keep_default_na=False)
    assert [",".join(row) for row in written[["slide_id", "fold0", "fold1"]].itertuples(index=False)] == [
        row for row in GOOD if not row.startswith("S11,")
    ]
    # What the pipeline wrote can be edited and given back.
    split_dataset({"demo": tmp_path / "table.csv"}, CLASSES,
                  SplitSettings(scheme="file", path=str(tmp_path / "splits.csv")), tmp_path / "again.csv")  # fmt: skip
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "splits.csv").read_text()
    # A slide that failed need not be there, one that was read must.
    for row in ([], ["S0,,"]):
        config = load_config(configured(tmp_path, [*row, *GOOD[1:]]))
        with pytest.raises(SplitError, match="slide S0 is in no fold: give it parts, or fill 'exclude' in the sheet"):
            split_dataset({"demo": tmp_path / "table.csv"}, CLASSES, split, tmp_path / "again.csv")
    configured(tmp_path, GOOD)
    failed = slides.assign(status=["failed" if name in ("S0", "S6") else "ready" for name in slides["slide_id"]])
    failed.to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(SplitError, match="fold0 has no slide of class 'normal' in its train part"):
        split_dataset({"demo": tmp_path / "table.csv"}, CLASSES, split, tmp_path / "splits.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows, "S6b,train,val"], "slide 'S6b' is in no sheet of the dataset; did you mean 'S6'?"),
        (lambda rows: [*rows[:-1], "S5b,train,val"],
         "patient P5 is in two parts of fold0: S5 in test; S5b in train; give all slides of a patient one part"),
        (lambda rows: [r.replace("S2,val", "S2,train").replace("S8,val", "S8,train") for r in rows],
         "fold0 has no slide of class 'normal' in its val part"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_before_any_job(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(configured(tmp_path, change(GOOD)))
    assert message in str(caught.value)
    assert "own.csv: " in str(caught.value)


def test_labels_and_patients_of_a_file_must_be_the_sheets(tmp_path: Path) -> None:
    rows = [f"{row},{'normal' if row.startswith('S5b') else CLASSES[int(row[1:].split(',')[0]) % 2]}"
            for row in GOOD]  # fmt: skip
    with pytest.raises(ConfigError, match="slide S5b has label 'normal', the sheet says 'tumour': make them one"):
        load_config(configured(tmp_path, rows, "slide_id,fold0,fold1,label"))


def test_paths_belong_to_the_schemes_that_read_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only the schemes file and clam use it, this one is kfold"):
        load_config(configured(tmp_path, GOOD, scheme="kfold"))
    with pytest.raises(ConfigError, match=r"the scheme clam needs the path of its folder of splits_0\.csv"):
        load_config(configured(tmp_path, GOOD, scheme="clam", path=None))
    with pytest.raises(ConfigError, match=r"absent\.csv does not exist"):
        load_config(configured(tmp_path, GOOD, path="absent.csv"))
    with pytest.raises(ConfigError, match=r"split\.path: .* is a folder: name a CSV .* or use the scheme clam"):
        load_config(configured(tmp_path, GOOD, path=str(tmp_path)))
    (tmp_path / "mine.csv").write_text("slide_id,fold0\nS0,train\n")
    with pytest.raises(ConfigError, match=r"mine\.csv is a file: name the folder of splits_0\.csv, .* the scheme file"):
        load_config(configured(tmp_path, GOOD, scheme="clam", path=str(tmp_path / "mine.csv")))


@pytest.mark.parametrize(
    "content", [b"", b"slide_id,fold0\nS0,tr\xe4in\n", b"slide_id,fold0\nS0,train,test,val\nS1,a,b,c,d\n"]
)
def test_files_that_are_no_csv_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "splits_0.csv").write_bytes(content)
    for scheme, path in (("file", tmp_path / "splits_0.csv"), ("clam", tmp_path)):
        with pytest.raises(ConfigError, match=r"split\.path: .*splits_0\.csv(: the lines| is not (a CSV|in UTF-8))"):
            load_config(configured(tmp_path, GOOD, scheme=scheme, path=str(path)))
