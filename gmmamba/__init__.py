"""GMMamba: whole-slide-image classification, from features to report."""

from slidestore import __version__ as __version__
