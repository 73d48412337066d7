"""The slide table of a cohort: what became of every row of its sheet.

Reads the sheet, the tile records and the stores; writes ``results/{cohort}/features/{encoder}.csv`` with columns
``slide_id, patient_id, label, split, site, status, reason, n_patches, n_damaged, store, content, thumbnail,
tile_record``. `status` is ``ready``, ``failed`` or ``excluded``. No slide disappears: a failed one stands here with its
reason. `n_damaged` counts the patches that could not be decoded. `content` is a digest of what is in the store: other
features make another table, so that what was trained on the old ones is trained again.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from gmmamba.cohort import Slide
from slidestore import content_digest, open_store
from slidestore.atomic import replace_when_whole

COLUMNS = [
    "slide_id", "patient_id", "label", "split", "site", "status", "reason", "n_patches", "n_damaged", "store",
    "content", "thumbnail", "tile_record",
]  # fmt: skip


class TooManyFailedError(RuntimeError):
    """More slides failed than `max_failed_share` allows."""


def account_cohort(
    cohort: str,
    slides: list[Slide],
    tiles: Path,
    stores: Path,
    encoder: str,
    max_failed_share: float,
    output: Path,
) -> None:
    """Write the slide table. `tiles` and `stores` are the folders with the tile records and the stores.

    Raises:
        TooManyFailedError: listing the failed slides with their reasons; their stores and those of all others are kept.
        slidestore.StoreError: if a store cannot be used.
    """
    rows = []
    for slide in slides:
        store_file = stores / f"{slide.slide_id}.zarr.zip"
        status, reason, n_patches, n_damaged, content = "excluded", slide.exclude, 0, 0, ""
        if not slide.exclude:
            store, content = open_store(store_file, encoder), content_digest(store_file)
            n_patches, n_damaged = len(store.coords), len(store.attributes.damaged)
            failure = store.attributes.failure
            status, reason = ("failed", f"{failure['stage']}: {failure['reason']}") if failure else ("ready", "")
        rows.append((
            slide.slide_id, slide.patient_id, slide.label, slide.split, slide.site, status, reason, n_patches,
            n_damaged, store_file, content, tiles / f"{slide.slide_id}.thumbnail.jpg", tiles / f"{slide.slide_id}.json",
        ))  # fmt: skip
    table = pd.DataFrame(rows, columns=COLUMNS)
    failed = table[table.status == "failed"]
    tried = int((table.status != "excluded").sum())
    if tried and len(failed) / tried > max_failed_share:
        reasons = "\n".join(f"  - {row.slide_id}: {row.reason}" for row in failed.itertuples())
        raise TooManyFailedError(
            f"cohort {cohort}: {len(failed)} of {tried} slides failed, more than max_failed_share "
            f"({max_failed_share:g}) allows. Mend or exclude them in the sheet, or raise max_failed_share:\n{reasons}"
        )
    with replace_when_whole(output) as temporary:
        table.to_csv(temporary, index=False)
