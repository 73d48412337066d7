"""The contract between the stages: what the store of one slide holds, how it is written, opened and
validated.

Also the two habits that every stage shares: outputs appear whole or not at all (`slidestore.atomic`), and
settings refuse unknown keys by name (`slidestore.settings`).
"""

from slidestore.store import (
    SCHEMA_VERSION,
    SlideStore,
    StoreAttributes,
    StoreError,
    content_digest,
    open_store,
    write_store,
)

# Here, and not asked of the installed metadata: conda's jobs run from the checkout, uninstalled.
__version__ = "0.1.0"

__all__ = [
    "SCHEMA_VERSION",
    "SlideStore",
    "StoreAttributes",
    "StoreError",
    "content_digest",
    "open_store",
    "write_store",
]
