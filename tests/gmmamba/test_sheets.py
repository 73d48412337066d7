"""Slide sheets from what people have: folders as GDC and others leave them, tables in several forms."""

import unicodedata
from pathlib import Path

import pandas as pd
import pytest
import yaml

from gmmamba.__main__ import main
from gmmamba.cohort import read_sheet
from gmmamba.config import load_config
from gmmamba.label_tables import SheetError, read_label_table
from gmmamba.sheets import build_sheet, safe_ids, write_sheet

A, B, C, D = (f"TCGA-{site}-000{i}" for i, site in enumerate(("A1", "A1", "B2", "C3")))


def touch(folder: Path, *names: str, content: bytes = b"") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def gdc(tmp_path: Path) -> Path:
    """A folder as gdc-client leaves it, with all that goes wrong."""
    folder = tmp_path / "gdc"
    touch(folder, f"u1/{A}-01Z-00-DX1.AAAA.svs", f"u2/{A}-01Z-00-DX2.BBBB.svs", f"u3/{A}-01A-01-TS1.CCCC.svs")
    touch(folder, f"u4/{B}-06Z-00-DX1.DDDD.svs", f"u9/{B}-06Z-00-DX1.DDDD.svs", content=b"whole")
    touch(folder, f"u5/{C}-01Z-00-DX1.eeee.svs", f"u6/{D}-01Z-00-DX1.FFFF.svs", "u7/TCGA-D4-0009-01Z-00-DX1.G.svs")
    touch(folder, f"u8/{D}-11A-01-DX1.HHHH.svs", f"a/{B}-06Z-00-DX1.DDDD.svs", content=b"half")
    touch(folder, "u1/logs/x.svs.parcel", "u1/annotations.txt", f"v/{C}-01Z-00-DX2.GGGG.svs.partial", "MANIFEST.txt")
    (folder / "u1/loop").symlink_to(folder)
    return folder


def written(folder: Path, output: Path, *tables: Path, **options: object) -> tuple[pd.DataFrame, str]:
    sheet = build_sheet(folder, tables, **options)  # type: ignore[arg-type]
    write_sheet(sheet, output)
    return pd.read_csv(output, dtype=str, keep_default_na=False).set_index("slide_id"), sheet.summary()


def test_gdc_folders_with_a_clinical_table(gdc: Path, tmp_path: Path) -> None:
    clinical = table(
        tmp_path / "clinical.tsv",
        "case_id\tcase_submitter_id\tproject_id\tprimary_diagnosis\tdiagnosis_is_primary_disease",
        f"0\t{A}\tTCGA-BRCA\tInfiltrating duct carcinoma, NOS\ttrue",  # a line a treatment
        f"0\t{A}\tTCGA-BRCA\tInfiltrating duct carcinoma, NOS\ttrue",
        f"0\t{A}\tTCGA-BRCA\tBasal cell carcinoma, NOS\tfalse",  # another disease
        f"1\t{B}\tTCGA-BRCA\tLobular carcinoma, NOS\ttrue",
        f"2\t{C}\tTCGA-BRCA\tMedullary carcinoma, NOS\ttrue",
        f"3\t{D}\tTCGA-BRCA\t'--\ttrue",
        "4\tTCGA-E5-0007\tTCGA-BRCA\tLobular carcinoma, NOS\ttrue",
    )
    classes = {"Infiltrating duct carcinoma, NOS": "IDC", "Lobular carcinoma, NOS": "ILC", "Lobular carcinoma": "ILC"}
    rows, summary = written(gdc, tmp_path / "sheet.csv", clinical, mapping=classes)

    part = rows[rows["exclude"] == ""]
    assert part[["patient_id", "label", "site"]].to_numpy().tolist() == [
        [A, "IDC", "A1"], [A, "IDC", "A1"], [B, "ILC", "A1"],
    ]  # fmt: skip
    assert rows.loc[f"{A}-01Z-00-DX1.AAAA", "path"] == f"gdc/u1/{A}-01Z-00-DX1.AAAA.svs"  # relative to the sheet
    assert rows.loc[f"{B}-06Z-00-DX1.DDDD", "path"].startswith("gdc/u4/")  # the largest copy, of equal ones the first
    reasons = rows[rows["exclude"] != ""]["exclude"].to_dict()
    assert len(rows) == 10
    assert reasons[f"{A}-01A-01-TS1.CCCC"] == "not a diagnostic section but a frozen one (TS)"
    assert reasons[f"{C}-01Z-00-DX1.eeee"] == "label 'Medullary carcinoma, NOS' is not mapped to a class"
    assert reasons[f"{D}-01Z-00-DX1.FFFF"] == "no label in its line"
    assert reasons[f"{D}-11A-01-DX1.HHHH"] == "sample type 11 is normal tissue"
    assert reasons["TCGA-D4-0009-01Z-00-DX1.G"] == "no line in clinical.tsv"
    assert "(5 bytes, this one 4)" in reasons[f"{B}-06Z-00-DX1.DDDD-3"]
    for line in (
        "10 slides found; other files: .parcel 1, .txt 2",
        "clinical.tsv: 6 lines, form gdc-clinical, labels from column 'primary_diagnosis'",
        "10 rows written, 3 slides of 2 patients take part:",
        "      2  IDC (1 patients)",
        f"      2  second copy of a slide: {B}-06Z-00-DX1.DDDD-2, {B}-06Z-00-DX1.DDDD-3",
        "      1  patient in a table without a slide in the folder: TCGA-E5-0007",
        f"      1  unfinished download, or link to nowhere: {gdc}/v/{C}-01Z-00-DX2.GGGG.svs.partial",
        "      1  mapped label that no line has: 'Lobular carcinoma' (did you mean 'Lobular carcinoma, NOS'?)",
        "TCGA sample types: 01 (primary tumour) 2, 06 (metastasis) 1",
    ):
        assert line in summary.splitlines()

    frozen = build_sheet(gdc, [clinical], mapping=classes, frozen=True)
    assert not next(row for row in frozen.rows if "TS1" in row.slide_id).exclude
    with pytest.raises(SheetError, match="is there already"):
        write_sheet(frozen, tmp_path / "sheet.csv")


FORMS = {
    "clam": ["case_id,slide_id,label", "p1,s1,0", "p2,s2,1", "p2,s3,1"],
    "acmil": [",case_id,slide_id,split_info,full_path,label", "0,p1,s1,train,/x/s1.svs,0", "1,p2,s2,val,/x/s2.svs,1",
              "2,p2,s3,val,/x/s3.svs,1"],
    "slideflow": ["patient,kind,site,slide", "p1,0,Site-3,s1", "p2,1,Site-4,S2", "p2,1,Site-4,s3"],
    "semicolons": ["patient;kind;slide", "p1;0;s1", "p2;1;s2", "p2;1;s3"],
    "named": ["who,what,where", "p1,0,s1.svs", "p2,1,s2.svs", "p2,1,s3.svs"],
    "stamp": (["PATIENT,isMSIH", "p1,0", "p2,1"],
              ["PATIENT,FILENAME,DATE", "p1,s1.h5,1", "p2,b/s2.h5,2", "p2,s3.h5,3"]),
    "gdc": (["cases.submitter_id\tdiagnoses.primary_diagnosis", "p1\t0", "p2\t1"],
            ["File ID\tFile Name\tProject ID\tCase ID\tSample ID", "1\ts1.svs\tX\tp1\tp1-1", "2\ts2.svs\tX\tp2\tp2-1",
             "3\ts3.svs\tX\tp2\tp2-2"]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_sheet(tmp_path: Path, form: str) -> None:
    touch(tmp_path / "slides", "s1.svs", "deep/s2.SVS", "s3.tif")
    texts = FORMS[form] if isinstance(FORMS[form], tuple) else (FORMS[form],)
    tables = [table(tmp_path / f"{i}.txt", *lines) for i, lines in enumerate(texts)]
    columns = {"patient": "who", "slide": "where", "label": "what"} if form == "named" else {}
    rows, _ = written(
        tmp_path / "slides", tmp_path / "sheet.csv", *tables, columns=columns, mapping={"0": "n", "1": "t"}
    )
    assert rows.drop(columns=["split", "site"], errors="ignore").to_dict("index") == {
        "s1": {"patient_id": "p1", "label": "n", "path": "slides/s1.svs"},
        "s2": {"patient_id": "p2", "label": "t", "path": "slides/deep/s2.SVS"},
        "s3": {"patient_id": "p2", "label": "t", "path": "slides/s3.tif"},
    }
    if form == "acmil":
        assert rows["split"].to_dict() == {"s1": "train", "s2": "val", "s3": "val"}
    if form == "slideflow":
        assert rows["site"].to_dict() == {"s1": "Site-3", "s2": "Site-4", "s3": "Site-4"}


@pytest.mark.parametrize(
    ("lines", "form", "message"),
    [
        (
            ["id,diagnosis", "1,2"],
            None,
            r"no form that is known: 'id', 'diagnosis'.*--form.*gdc-clinical: case_submitter",
        ),
        (["case_id,slide_id,label,PATIENT", "1,2,3,4"], None, r"several forms \(clam, stamp\): 'case_id'"),
        (["case_id,slide_id,subtype", "1,2,3"], "clam", r"has no column 'label'; its columns are 'case_id'"),
        (["case_id,slide_id,label", "1,2,3"], "klam", r"unknown form 'klam'; the forms are clam, sheet, slideflow"),
        (["case_id,slide_id,label,split_info", "1,2,3,fold1"], None, r"line 2: split_info 'fold1' is none of"),
        ([""], None, "not a CSV file"),
        (["slide,diagnosis", "1,2"], None, "name the slides' column for both"),
        (["case_id,slide_id,label", "1,2,duct, NOS"], None, "more cells than the first one has names"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path: Path, lines: list[str], form: str, message: str) -> None:
    with pytest.raises(SheetError, match=f"(?s){message}"):
        read_label_table(table(tmp_path / "t.csv", *lines), form)


def test_a_sheet_is_a_table_too_and_a_slide_may_be_its_own_patient(tmp_path: Path) -> None:
    touch(tmp_path / "slides", "s1.svs", "s2.svs")
    old = table(tmp_path / "old.csv", "slide_id;patient_id;label;path", "s1;p1;H;elsewhere/s1.svs", "s2;p2;AC;s2.svs")
    sheet = build_sheet(tmp_path / "slides", [old], mapping={"H": "normal", "AC": "tumour"})
    assert [(row.slide_id, row.patient_id, row.label) for row in sheet.rows] == [
        ("s1", "p1", "normal"), ("s2", "p2", "tumour"),
    ]  # fmt: skip
    short = table(tmp_path / "short.csv", "slide,label", "s1,H", "s2,AC")
    named = {"patient": "slide", "slide": "slide", "label": "label"}
    sheet = build_sheet(tmp_path / "slides", [short], columns=named)
    assert [(row.patient_id, row.label) for row in sheet.rows] == [("s1", "H"), ("s2", "AC")]


def test_projects_are_labels_where_the_sample_sheet_is_asked_for_them(tmp_path: Path) -> None:
    touch(tmp_path / "slides", f"u1/{A}-01Z-00-DX1.AAAA.svs", f"u2/{C}-01Z-00-DX1.BBBB.svs")
    samples = table(
        tmp_path / "gdc_sample_sheet.tsv",
        "File ID\tFile Name\tProject ID\tCase ID",
        f"1\t{A}-01Z-00-DX1.AAAA.svs\tTCGA-LUAD\t{A}",
        f"2\t{C}-01Z-00-DX1.BBBB.svs\tTCGA-LUSC\t{C}",
    )
    clinical = table(tmp_path / "clinical.tsv", "case_submitter_id\tprimary_diagnosis", f"{A}\tAdenocarcinoma, NOS")
    for tables in ([samples], [samples, clinical]):
        sheet = build_sheet(tmp_path / "slides", tables, columns={"label": "Project ID"}, mapping={"TCGA-LUAD": "LUAD"})
        assert [row.label for row in sheet.rows] == ["LUAD", ""]
        assert sheet.rows[1].exclude == "label 'TCGA-LUSC' is not mapped to a class"


@pytest.mark.parametrize("column", ["Sample Type", "Tissue Type"])
def test_normal_tissue_is_no_tumour_also_without_a_barcode(tmp_path: Path, column: str) -> None:
    """CPTAC's names say nothing of the tissue, GDC's sample sheet does."""
    touch(tmp_path / "slides", "C3L-1-21.svs", "C3L-1-26.svs")
    samples = table(
        tmp_path / "gdc_sample_sheet.tsv",
        f"File Name\tCase ID\t{column}",
        "C3L-1-21.svs\tC3L-1\tPrimary Tumor",
        "C3L-1-26.svs\tC3L-1\tSolid Tissue Normal",
    )
    clinical = table(tmp_path / "clinical.tsv", "case_submitter_id\tprimary_diagnosis", "C3L-1\tAdenocarcinoma, NOS")
    sheet = build_sheet(tmp_path / "slides", [samples, clinical])
    assert {row.slide_id: row.exclude for row in sheet.rows} == {
        "C3L-1-21": "", "C3L-1-26": "'Solid Tissue Normal' is normal tissue"
    }  # fmt: skip


def test_which_column_is_the_label_is_asked_and_not_guessed(tmp_path: Path) -> None:
    touch(tmp_path / "slides", "s1.svs")
    two = table(tmp_path / "t.csv", "patient,slide,age,grade", "p1,s1,60,2")
    with pytest.raises(SheetError, match=r"which column is the label\? Name it with --label-column.*'age', 'grade'"):
        build_sheet(tmp_path / "slides", [two])
    assert build_sheet(tmp_path / "slides", [two], columns={"label": "grade"}).rows[0].label == "2"
    with pytest.raises(SheetError, match="--label-column 'grad' is in no table"):
        build_sheet(tmp_path / "slides", [two], columns={"label": "grad"})
    with pytest.raises(
        SheetError, match=r"(?s)none of the 1 slides takes part.*no line in u.csv: s1\nThe tables name x9"
    ):
        build_sheet(tmp_path / "slides", [table(tmp_path / "u.csv", "case_id,slide_id,label", "p,x9,1")])


def test_patients_with_two_labels_are_excluded_by_name(tmp_path: Path) -> None:
    touch(tmp_path / "slides", "s1.svs", "s2.svs", "s3.svs", "s4.svs")
    labels = table(tmp_path / "t.csv", "case_id,slide_id,label", "p1,s1,a", "p1,s2,b", "p2,s3,a", "p2,s3,b", "p3,s4,a",
                   "p3,s4,a", "p3,s5,a", ",,b")  # fmt: skip
    rows, summary = written(tmp_path / "slides", tmp_path / "sheet.csv", labels)
    assert rows["exclude"].to_dict() == {
        "s1": "patient p1 has two labels: a (s1), b (s2)", "s2": "patient p1 has two labels: a (s1), b (s2)",
        "s3": "two labels: a, b", "s4": "",
    }  # fmt: skip
    assert "      2  patient with two labels: s1, s2" in summary
    assert "      2  slide in several lines of the tables: s3, s4" in summary
    assert "      1  slide in a table but not in the folder: s5" in summary
    assert "      1  line without slide and patient: t.csv line 9" in summary


def test_any_file_name_comes_through_to_the_configuration(tmp_path: Path) -> None:
    names = [
        "plain.svs",
        "a b.svs",
        "a_b.svs",
        "a'b\".svs",
        "Schnitt-é 1.svs",
        "切片.svs",
        "{x},y.tif",
        " lead.svs",
    ]
    decomposed = unicodedata.normalize("NFD", "Schnitt-é 1.svs")  # as macOS writes it
    touch(tmp_path / " slides", *[decomposed if "é" in name else name for name in names])
    quoted = ['"' + name.replace('"', '""') + '"' for name in names]
    labels = table(tmp_path / "t.csv", "PATIENT,FILENAME,x", *[f"p{i},{name},{i % 2}" for i, name in enumerate(quoted)])
    sheet = build_sheet(tmp_path / " slides", [labels], columns={"label": "x"}, mapping={"0": "n", "1": "t"})
    write_sheet(sheet, tmp_path / "sheet.csv")
    assert "      6  slide_id other than the file's name, which has unsafe characters: " in sheet.summary()
    slides = load_config(minimal_config(tmp_path / "sheet.csv", ["n", "t"], {"folds": 2})).cohorts["c"].slides
    assert sorted(slides) == ["Schnitt-e_1", "a_b", "a_b-2", "a_b-3", "lead", "plain", "slide", "x_y"]


def test_ids_are_safe_unique_and_those_of_safe_names_their_own() -> None:
    assert safe_ids(["a b.svs", "a_b.svs", "A_B.tif", "é.svs", "片.svs", "-x.svs", "v1.2.svs"]) == [
        "a_b-3", "a_b", "A_B-2", "e", "slide", "x", "v1.2",
    ]  # fmt: skip


REAL = {  # table: the slides by class, and options for it
    "bracs_acmil.csv": ({"benign": 265, "atypical": 89, "malignant": 193}, 547, {
        "mapping": dict(zip("0123456", ["benign"] * 3 + ["atypical"] * 2 + ["malignant"] * 2, strict=True))}),
    "tcga_brca_acmil.csv": ({"IDC": 831, "ILC": 210}, 977, {}),
    "tcga_lung_slideflow.csv": ({"adenocarcinoma": 467, "squamous": 474}, 941, {}),
    "camelyon16_acmil.csv": ({"0": 229, "1": 150}, 352, {}),  # ten patients have a slide of each class
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_tables(shared: Path, tmp_path: Path, name: str) -> None:
    """Empty files for every slide of the table, in a folder each, and through to check-config."""
    counts, patients, options = REAL[name]
    source = shared / "data/labels" / name
    listed = pd.read_csv(source, dtype=str)
    slides = listed["slide"] if "slide" in listed else listed["slide_id"]
    touch(tmp_path / "slides", *[f"{i:04d}/{slide}.svs" for i, slide in enumerate(slides)])
    rows, summary = written(tmp_path / "slides", tmp_path / "sheet.csv", source, **options)
    assert len(rows) == len(listed)
    part = rows[rows["exclude"] == ""] if "exclude" in rows else rows
    assert part["label"].value_counts().to_dict() == counts
    assert part["patient_id"].nunique() == patients
    assert f"{sum(counts.values())} slides of {patients} patients take part" in summary

    split = {"scheme": "column"} if "split" in rows else {"scheme": "site_preserved"} if "site" in rows else {}
    load_config(minimal_config(tmp_path / "sheet.csv", list(counts), split))


def minimal_config(sheet: Path, classes: list[str], split: dict[str, str]) -> dict:
    return {
        "cohorts": {"c": {"sheet": str(sheet)}},
        "encoders": {"e": {"model": "resnet18", "weights": "random"}},
        "datasets": {"d": {"cohorts": ["c"], "classes": classes, "encoder": "e", "split": split}},
        "models": {"mean": {"method": "mean"}},
        "experiments": {"mean": {"model": "mean", "dataset": "d"}},
    }


def test_the_command(gdc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    lines = [f"p{i},s{i},{i % 2}" for i in range(20)]
    touch(tmp_path / "flat", *[f"s{i}.svs" for i in range(20)])
    labels = table(tmp_path / "labels.csv", "case_id,slide_id,label", *lines)
    arguments = ["--labels", str(labels), "--map", "0=n", "1=t", "--output", str(tmp_path / "out/sheet.csv")]
    assert main(["sheet", "--slides", str(tmp_path / "flat"), *arguments]) == 0
    assert "20 rows written, 20 slides of 20 patients take part:" in capsys.readouterr().out
    slides, problems = read_sheet(tmp_path / "out/sheet.csv", "c")
    assert not problems
    assert slides["s3"].path == tmp_path / "flat" / "s3.svs"  # not below the sheet: absolute
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(minimal_config(tmp_path / "out/sheet.csv", ["n", "t"], {})))
    assert main(["check-config", str(config)]) == 0
    assert main(["sheet", "--slides", str(gdc), *arguments[:2], "--output", str(tmp_path / "other.csv")]) == 1
    assert "gmmamba sheet: none of the 10 slides takes part" in capsys.readouterr().err
