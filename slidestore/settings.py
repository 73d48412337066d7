"""Frozen settings from JSON or YAML mappings; what is mistyped fails by name."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def nearest(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """A hint for a word that is not known: the nearest one that is, or `otherwise`, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(sorted(known))}" if otherwise is None else otherwise


def from_dict(cls: type[Settings], mapping: Mapping[str, Any], where: str) -> Settings:
    """Build the dataclass `cls` from `mapping`; `where` names the place of the mapping in error messages.

    Raises ValueError for a key that `cls` does not have (naming the nearest one that it has) and for a
    missing one that has no default.
    """
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for key in mapping:
        if key not in known:
            hint = nearest(key, known, f"known keys: {', '.join(known)}")
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    required = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in mapping]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(map(repr, missing))}")
    return cls(**mapping)


def own_function(text: str) -> tuple[Path, str] | None:
    """File and name of a function of the user's own, "my_encoders.py:uni"; None for what is no such setting."""
    match = re.fullmatch(r"(.+\.py):(\w+)", text)
    return (Path(match[1]), match[2]) if match else None
