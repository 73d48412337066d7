"""Fixtures that several test folders use."""

import os
from pathlib import Path

import pytest

# Tests run side by side, one a core: more threads only wait for each other. Before torch or numpy are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton's kernels run interpreted, on the CPU; on a GPU machine, TRITON_INTERPRET=0 tests them compiled. Before triton
# is imported, by whichever test comes first.
os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference cases and real slides, which lies beside the project; tests skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference cases and real slides, which are not part of the project: no {SHARED}")
    return SHARED
