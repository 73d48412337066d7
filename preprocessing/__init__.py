"""Slides to patches (`tile`) to features (`encode`); imports slidestore, never gmmamba."""

from importlib.metadata import PackageNotFoundError, version


def created_by() -> str:
    """The program and its version, as it stands in every record and store."""
    try:
        return f"gmmamba {version('gmmamba')}"
    except PackageNotFoundError:
        return "gmmamba (run from its source folder, not installed)"
