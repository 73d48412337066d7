"""A mistyped key fails by name."""

from dataclasses import dataclass, field

import pytest

from slidestore.settings import from_dict


@dataclass(frozen=True)
class Example:
    name: str
    threshold: float = 8.0
    classes: list[str] = field(default_factory=list)


def test_defaults_are_filled_in() -> None:
    assert from_dict(Example, {"name": "a"}, "here") == Example("a", 8.0, [])


def test_a_misspelt_key_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match=r"cohorts.a.tissue: unknown key 'treshold'; did you mean 'threshold'"):
        from_dict(Example, {"name": "a", "treshold": 3}, "cohorts.a.tissue")


def test_a_key_like_no_other_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known keys: name, threshold, classes"):
        from_dict(Example, {"name": "a", "xyz": 3}, "here")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match="here: missing 'name'"):
        from_dict(Example, {}, "here")
