"""Slide sheets fail by line, before any job starts; so do datasets that cannot be made of them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gmmamba.__main__ import main
from gmmamba.config import load_config
from preprocessing.tile import TilingSettings
from tests.gmmamba.configs import good_config, good_rows, problems, write_sheet


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("S1,P90,normal,new.svs", "slide_id 'S1' stands in line 3 already"),
        ("S90,P1,normal,new.svs", "patient P1 has two labels"),
        ("S90,P90,normal,absent.svs", "no such file"),
        ("S90,,normal,new.svs", "has no patient_id"),
        ("S 90,P90,normal,new.svs", "slide_id 'S 90'"),
        ("../S90,P90,normal,new.svs", "slide_id '../S90'"),
        ("S90,P90,tumor,new.svs", "unknown label 'tumor', did you mean 'tumour'?"),
    ],
)
def test_each_bad_row_is_named_with_its_line(tmp_path: Path, row: str, message: str) -> None:
    text = problems(good_config(write_sheet(tmp_path, [*good_rows(), row])))
    assert message in text
    assert "slides.csv" in text


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    rows = [*good_rows(), "S1,P90,normal,new.svs", "S91,P91,normal,absent.svs"]
    text = problems(good_config(write_sheet(tmp_path, rows)))
    assert "already" in text
    assert "absent.svs" in text


def test_what_a_whole_cohort_has_is_said_five_times_and_counted(tmp_path: Path) -> None:
    absent = write_sheet(tmp_path, [row.replace("s", "absent") for row in good_rows()])
    assert "  - 15 more of the same kind" in problems(good_config(absent))
    config = good_config(write_sheet(tmp_path, good_rows()))
    config["datasets"]["demo"]["classes"] = ["normal", "cancer"]
    text = problems(config)
    assert text.count("unknown label 'tumour', datasets.demo.classes: normal, cancer") == 5
    assert text.endswith("  - 5 more of the same kind")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_sheet_may_be_as_a_spreadsheet_saves_it(tmp_path: Path, separator: str) -> None:
    sheet = write_sheet(tmp_path, good_rows())
    sheet.write_bytes(("\ufeff" + sheet.read_text().replace(",", separator).replace("\n", "\r\n")).encode())
    slide = load_config(good_config(sheet)).cohorts["demo"].slides["S1"]
    assert (slide.patient_id, slide.label, slide.path, slide.line) == ("P1", "tumour", tmp_path / "s1.svs", 3)


def test_a_sheet_of_another_kind_is_refused_with_the_remedy(tmp_path: Path) -> None:
    sheet = write_sheet(tmp_path, good_rows())
    sheet.write_bytes(sheet.read_text().replace("P1,", "Müller,").encode("latin-1"))
    assert f'{sheet} is not in UTF-8: save it again as "CSV UTF-8"' in problems(good_config(sheet))
    workbook = sheet.rename(tmp_path / "slides.xlsx")
    assert f"{workbook} is a spreadsheet: save it as CSV (UTF-8)" in problems(good_config(workbook))


def test_excluded_rows_are_kept_but_not_checked_for_files(tmp_path: Path) -> None:
    rows = [row + "," for row in good_rows()] + ["S90,P90,whatever,absent.svs,blurred"]
    config = good_config(write_sheet(tmp_path, rows, "slide_id,patient_id,label,path,exclude"))
    slides = load_config(config).cohorts["demo"].slides
    assert slides["S90"].exclude == "blurred"
    assert slides["S0"].exclude == ""


def test_mpp_comes_from_the_row_before_the_cohort(tmp_path: Path) -> None:
    rows = [*(row + ",," for row in good_rows()), "S90,P90,normal,n.svs,0.25,", "S91,P91,normal,m.svs,,20"]
    config = good_config(write_sheet(tmp_path, rows, "slide_id,patient_id,label,path,mpp,magnification"))
    config["cohorts"]["demo"]["magnification"] = 40
    slides = load_config(config).cohorts["demo"].slides
    assert [(slides[s].mpp, slides[s].mpp_source) for s in ("S0", "S90", "S91")] == [
        (0.25, "config"), (0.25, "sheet"), (0.5, "sheet"),
    ]  # fmt: skip


def test_a_slide_overrides_tiling_and_names_its_mask(tmp_path: Path) -> None:
    """Numbers as spreadsheets write them; an empty cell leaves the cohort's value."""
    rows = [*(row + ",,," for row in good_rows()), "S90,P90,normal,n.svs,otsu,256.0,outlines/n.geojson"]
    (tmp_path / "outlines").mkdir()
    (tmp_path / "outlines" / "n.geojson").touch()
    header = "slide_id,patient_id,label,path,tiling.saturation_threshold,tiling.patch_px,mask"
    config = good_config(write_sheet(tmp_path, rows, header))
    config["cohorts"]["demo"]["tiling"] = {"saturation_threshold": 12, "mpp": 1.0}
    cohort = load_config(config).cohorts["demo"]
    assert cohort.tiling_of(cohort.slides["S0"]) == cohort.tiling
    assert cohort.tiling_of(cohort.slides["S90"]) == cohort.tiling | {"saturation_threshold": "otsu", "patch_px": 256}
    assert cohort.slides["S90"].mask == tmp_path / "outlines" / "n.geojson"
    assert cohort.slides["S0"].mask is None
    TilingSettings(**cohort.tiling_of(cohort.slides["S90"]))  # as `tile` will build it


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("tiling.patch_px", "many", "slides.csv, line 22: tiling.patch_px: 'many' is not of type 'integer'"),
        ("tiling.min_tissue_share", "30", "slides.csv, line 22: tiling.min_tissue_share: 30 is greater than"),
        ("tiling.mpp", "nan", "slides.csv, line 22: tiling.mpp: 'nan' is not of type 'number'"),
        ("tiling.overlap_px", "224", "line 22: tiling: overlap_px (224) must be less than patch_px (224)"),
        ("tiling.patchpx", "", "slides.csv: unknown column 'tiling.patchpx', did you mean 'tiling.patch_px'?"),
        ("tiling.colour", "", "slides.csv: unknown column 'tiling.colour', keys of `tiling`: patch_px, "),
        ("tiling_patch_px", "256", "unknown column 'tiling_patch_px', did you mean 'tiling.patch_px'?"),
        ("masks", "m.png", "unknown column 'masks', did you mean 'mask'?"),
        ("mask", "absent.png", "slides.csv, line 22: slide S90: no such mask: "),
        ("mask", "m.xml", "m.xml is none of .geojson, .json, .png, .tif, .tiff"),
    ],
)
def test_a_slide_s_own_settings_are_checked_like_the_config(
    tmp_path: Path, column: str, cell: str, message: str
) -> None:
    rows = [*(row + "," for row in good_rows()), f"S90,P90,normal,n.svs,{cell}"]
    text = problems(good_config(write_sheet(tmp_path, rows, f"slide_id,patient_id,label,path,{column}")))
    assert message in text


def test_a_misspelt_column_is_named(tmp_path: Path) -> None:
    rows = [row + ",0.5" for row in good_rows()]
    text = problems(good_config(write_sheet(tmp_path, rows, "slide_id,patient,label,path,mppp")))
    assert "no column 'patient_id' ('patient' is misspelt?)" in text
    assert "unknown column 'mppp', did you mean 'mpp'?" in text


def test_cells_without_a_column_are_an_error(tmp_path: Path) -> None:
    text = problems(good_config(write_sheet(tmp_path, [row + "," for row in good_rows()])))
    assert "slides.csv: the lines have more cells than the first one has names" in text


@pytest.fixture
def three_cohorts(config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Cohorts A, B and C of 20 patients each, five a site, and one dataset of them."""
    sheets = {}
    for cohort in "ABC":
        rows = [row.replace("S", cohort).replace("P", f"{cohort}-P") + f",{cohort}{i // 5}"
                for i, row in enumerate(good_rows())]  # fmt: skip
        (tmp_path / cohort).mkdir()
        sheets[cohort] = write_sheet(tmp_path / cohort, rows, "slide_id,patient_id,label,path,site")
    config["cohorts"] = {cohort: {"sheet": str(sheet)} for cohort, sheet in sheets.items()}
    config["datasets"]["demo"]["cohorts"] = list("ABC")
    return config


@pytest.mark.parametrize(
    ("split", "folds"),
    [
        ({"scheme": "external", "test_cohorts": ["C"], "folds": 4}, 4),
        ({"scheme": "leave_one_cohort_out"}, 3),
        ({"scheme": "site_preserved", "folds": 3}, 3),
    ],
)
def test_several_cohorts_and_a_patient_who_would_be_in_two_parts(
    three_cohorts: dict[str, Any], tmp_path: Path, split: dict[str, Any], folds: int
) -> None:
    three_cohorts["datasets"]["demo"]["split"] = split
    assert load_config(three_cohorts).datasets["demo"].folds == list(range(folds))

    sheet = tmp_path / "C" / "slides.csv"
    sheet.write_text(sheet.read_text().replace("C3,C-P3,", "C3,A-P1,"))
    text = problems(three_cohorts)
    assert "datasets.demo.split: patient A-P1 has slides " in text
    assert f"for A1 ({tmp_path / 'A' / 'slides.csv'}, line 3)" in text  # where both stand
    assert f"for C3 ({sheet}, line 5)" in text
    assert "fill 'exclude' for" in text  # what to do


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"scheme": "external"}, "datasets.demo.split: the scheme external needs test_cohorts, some of A, B, C"),
        ({"scheme": "external", "test_cohorts": ["D"]}, "'D' is not in datasets.demo.cohorts, known: A, B, C"),
        ({"scheme": "external", "test_cohorts": ["A", "B", "C"]}, "none is left to train on"),
        ({"test_cohorts": ["A"]}, "only the scheme external uses them, this one is kfold"),
        ({"scheme": "column"}, "line 2: slide A0 has no 'split', which datasets.demo.split asks for (scheme column)"),
        ({"scheme": "site_preserved", "folds": 13}, "class 'normal' comes from 12 sites"),
    ],
)
def test_splits_that_cannot_be_are_named(three_cohorts: dict[str, Any], split: dict[str, Any], message: str) -> None:
    three_cohorts["datasets"]["demo"]["split"] = split
    assert message in problems(three_cohorts)


def test_a_cohort_of_which_nothing_is_left_is_named(three_cohorts: dict[str, Any], tmp_path: Path) -> None:
    sheet = tmp_path / "B" / "slides.csv"
    header, *rows = sheet.read_text().splitlines()
    sheet.write_text("\n".join([header + ",exclude", *(row + ",blurred" for row in rows)]) + "\n")
    three_cohorts["datasets"]["demo"]["split"] = {"scheme": "leave_one_cohort_out"}
    assert f"datasets.demo: no slide of cohort B takes part, see {sheet}" in problems(three_cohorts)


def test_two_parts_for_a_patient_are_named_before_any_job(tmp_path: Path) -> None:
    rows = [row + f",{('train', 'val', 'test')[i // 2 % 3]}" for i, row in enumerate(good_rows())]
    config = good_config(
        write_sheet(tmp_path, [*rows, "S90,P0,normal,n.svs,test"], "slide_id,patient_id,label,path,split")
    )
    config["datasets"]["demo"]["split"] = {"scheme": "column"}
    assert "patient P0 has two parts: 'train' for S0" in problems(config)


def test_a_slide_of_two_people_is_refused(tmp_path: Path) -> None:
    rows = [*good_rows(), "S90,P90,normal,s4.svs"]
    text = problems(good_config(write_sheet(tmp_path, rows)))
    assert re.search(r"demo: S4 \(.*slides.csv, line 6\); S90 \(.*slides.csv, line 22\) are one file, ", text)
    excluded = write_sheet(tmp_path, [f"{row}," for row in good_rows()] + [rows[-1] + ",a copy"],
                           "slide_id,patient_id,label,path,exclude")  # fmt: skip
    assert load_config(good_config(excluded)).warning_lines() == []


def test_what_a_person_must_judge_is_said_and_not_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*good_rows(), "S90,P90-normal,normal,n.svs", "S91,P90-tumour,tumour,t.svs", "S92,P0,normal,s0.svs"]
    config = good_config(write_sheet(tmp_path, rows))
    again, alike = load_config(config).warning_lines()
    assert re.search(r"datasets.demo: S0 \(.*line 2\); S92 \(.*line 24\) are one file, .* which counts 2 times", again)
    assert re.search(
        r"datasets.demo: .* P90-normal \(S90 .*line 22\)\) and P90-tumour \(S91 .*\)\. If these are", alike
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["check-config", str(tmp_path / "config.yaml")]) == 0
    assert capsys.readouterr().err.splitlines() == [f"Warning: {again}", f"Warning: {alike}"]


def test_cohorts_of_pairs_have_a_way_out(tmp_path: Path) -> None:
    """Tumour and normal tissue of one person: as different patients they are said, as one they need one label."""
    rows = [f"case{i}-{c},case{i}-{c},{c},c{i}{c}.svs" for i in range(20) for c in ("tumour", "normal")]
    assert "case0-tumour" in load_config(good_config(write_sheet(tmp_path, rows))).warning_lines()[0]
    one = [f"case{i}-{c},case{i},tumour,c{i}{c}.svs" for i in range(20) for c in ("tumour", "normal")]
    sheet = write_sheet(tmp_path, [*one, *(f"N{i},N{i},normal,n{i}.svs" for i in range(20))])
    assert load_config(good_config(sheet)).warning_lines() == []
