"""What the paper's tables hold: titles, metrics and rows of config/tables.yaml. What is in them, tables.py writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """A row, which is an experiment. parts: which columns of check marks it has; against: the row it gains over."""

    label: str
    model: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    against: str | None = None


@dataclass(frozen=True)
class Table:
    """A table of any dataset; `rows` by the name of their experiment, which the protocol completes."""

    title: str
    heading: str
    metrics: tuple[str, ...]
    rows: Mapping[str, Row]
    reference: str | None = None
    parts: tuple[str, ...] = ()


def table_of(definition: Mapping[str, Any]) -> Table:
    """A table of config/tables.yaml."""
    rows = {name: Row(**{"model": name, **row}) for name, row in definition["rows"].items()}
    return Table(**{**definition, "rows": rows})


def experiment_name(row: str, protocol: str) -> str:
    """Under which a row is trained: the folder says how."""
    return f"{row}.{protocol}"
