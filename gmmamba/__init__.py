"""GMMamba: whole-slide-image classification, from features to report.

In Python: `from gmmamba import Cohort, create_model, open_slide_store, predict, train` (docs/api.md).
"""

from importlib import import_module
from typing import Any

from slidestore import __version__ as __version__

# In step with __init__.pyi, which has their types. They load when asked for: they need torch, which planning must not
# import, and a plain import would count gmmamba.api into the fingerprint of every stage.
__all__ = [
    "Cohort",
    "Predictions",
    "TrainedModel",
    "create_model",
    "load_models",
    "open_slide_store",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("gmmamba.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
