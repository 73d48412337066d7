"""GMMamba: whole-slide-image classification, from features to report."""

from importlib.metadata import version

__version__ = version("gmmamba")
