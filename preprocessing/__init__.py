"""Slides to patches (`tile`) to features (`encode`); imports slidestore, never gmmamba."""

from slidestore import __version__

CREATED_BY = f"gmmamba {__version__}"  # as it stands in every record and store
