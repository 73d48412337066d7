"""Fixtures that several files use."""

from pathlib import Path
from typing import Any

import pytest

from tests.gmmamba.configs import good_config, good_rows, write_sheet


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return good_config(write_sheet(tmp_path, good_rows()))
