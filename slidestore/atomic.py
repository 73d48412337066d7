"""Outputs that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_when_whole(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends without an error.

    The block writes the whole output to the temporary path. Until the rename, `path` is absent or holds its
    old content, also after kill -9. The temporary name is always `.{name}.part`, so that what a killed job
    left behind is overwritten by the next one instead of piling up. Parent folders are made. On an error
    the temporary file is removed and the error goes on.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())  # else a power cut after the rename could leave an empty file
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
