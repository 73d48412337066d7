"""The multiple-instance-learning models by name. Importing this imports no torch: models load when asked for."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmmamba.models.bag import MILModel

MODELS = {
    "gmmamba": "gmmamba.models.gmmamba:GMMamba",
    "abmil": "gmmamba.models.abmil:ABMIL",
    "clam": "gmmamba.models.clam:CLAM",
    "dsmil": "gmmamba.models.dsmil:DSMIL",
    "dtfd": "gmmamba.models.dtfd:DTFD",
    "ibmil": "gmmamba.models.ibmil:IBMIL",
    "ilra": "gmmamba.models.ilra:ILRA",
    "acmil": "gmmamba.models.acmil:ACMIL",
    "transmil": "gmmamba.models.transmil:TransMIL",
    "mhim": "gmmamba.models.mhim:MHIM",
    "ssmmil": "gmmamba.models.s4mil:S4MIL",
    "mambamil": "gmmamba.models.mambamil:MambaMIL",
    "mean": "gmmamba.models.pooling:MeanPooling",
    "max": "gmmamba.models.pooling:MaxPooling",
}
CSS_HOSTS = frozenset({"abmil", "clam", "dtfd", "ilra", "acmil", "transmil", "ssmmil", "mambamil"})
"""Methods with an `encode`, trained in one stage: what CSS can be plugged into."""
CSS_PLUGIN = "gmmamba.models.css_plugin"
TWO_STAGES: frozenset[str] = frozenset({"ibmil", "mhim"})
"""Methods trained twice: first with stage=1, then from what that learned (`MILModel.start_from`)."""


def has_first_stage(method: str, hyperparameters: Mapping[str, Any]) -> bool:
    """Whether such a model starts from a first stage: not where it is itself that stage (stage: 1)."""
    return method in TWO_STAGES and hyperparameters.get("stage", 2) == 2


def model_modules(method: str, hyperparameters: Mapping[str, Any]) -> list[str]:
    """The modules whose code makes such a model, for its fingerprint."""
    plugged = [CSS_PLUGIN] if method in CSS_HOSTS and hyperparameters.get("css") else []
    return [MODELS[method].partition(":")[0], *plugged]


def create_model(method: str, in_dim: int, n_classes: int, **hyperparameters: Any) -> MILModel:
    """A model with `forward(bag: Bag) -> MILOutput`, freshly initialised from torch's random state.

    One of CSS_HOSTS with css=True (or "published") is that method with CSS as a plug-in.

    Raises ValueError for an unknown method, hyperparameter or named option; the message names the nearest known.
    """
    module, _, name = MODELS[known("method", method, MODELS)].partition(":")
    model_class = getattr(import_module(module), name)
    options = [option for option in inspect.signature(model_class).parameters if option not in ("in_dim", "n_classes")]
    css = hyperparameters.pop("css", False) if method in CSS_HOSTS else False
    for hyperparameter in hyperparameters:
        known(f"hyperparameter of {method}", hyperparameter, options)
    model: MILModel = model_class(in_dim, n_classes, **hyperparameters)
    if css:  # by name: its code counts in the fingerprint of the models that have it, not of all
        model = import_module(CSS_PLUGIN).CSSPlugin(model, n_classes, published=css == "published")
    return model


def known(what: str, value: str, options: Iterable[str]) -> str:
    """`value` if it is one of `options`, else a ValueError that names the nearest of them."""
    options = list(options)
    if value not in options:
        near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {what} {value!r}: {hint}Known: {', '.join(options)}")
    return value
