"""Configurations and slide sheets to spoil, and what is then said of them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gmmamba.config import ConfigError, load_config

ROOT = Path(__file__).parents[2]


def write_sheet(folder: Path, rows: list[str], header: str = "slide_id,patient_id,label,path") -> Path:
    """A sheet whose slides exist (empty files: nobody reads them here)."""
    for row in rows:
        name = row.split(",")[3]
        if name and "absent" not in name:
            (folder / name).touch()
    sheet = folder / "slides.csv"
    sheet.write_text("\n".join([header, *rows]) + "\n")
    return sheet


def good_rows() -> list[str]:
    return [f"S{i},P{i},{'tumour' if i % 2 else 'normal'},s{i}.svs" for i in range(20)]


def good_config(sheet: Path) -> dict[str, Any]:
    text = (ROOT / "config.yaml").read_text()
    return yaml.safe_load(text.replace("results/demo/cohort/slides.csv", str(sheet))) | {"models": named_models()}


def named_models() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "config" / "models.yaml").read_text())["models"]


def problems(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    return str(caught.value)
