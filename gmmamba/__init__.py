"""GMMamba: whole-slide-image classification, from features to report."""

__version__ = "0.1.0"  # here and not from the installed metadata: conda's jobs run from the checkout, uninstalled
