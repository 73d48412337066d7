"""One Zarr v3 store a slide, in one ZIP file (`<slide>.zarr.zip`).

| array      | shape, dtype   | meaning                                                                |
|------------|----------------|------------------------------------------------------------------------|
| `coords`   | (N, 2) int32   | (x, y) of the patch's top-left corner, level-0 pixels, row-major order |
| `features` | (N, D) float16 | row i belongs to `coords[i]`; chunks of 4096 rows                      |

The attributes are the fields of `StoreAttributes`. A slide that failed has a store too: N = 0, and its
attribute `failure` says at which stage and why, so that it can be accounted for downstream.

The ZIP carries no time stamps: equal content gives equal bytes.
"""

import hashlib
import zipfile
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slidestore.atomic import replace_when_whole
from slidestore.settings import from_dict

# zarr is imported where it is used: stages that need only slidestore.atomic should not wait for it.

SCHEMA_VERSION = "1.0"
CHUNK_ROWS = 4096  # a chunk a row reads 200 times slower


class StoreError(ValueError):
    """A store that does not keep the contract; the message names the file, what is wrong and the remedy."""


@dataclass(frozen=True)
class StoreAttributes:
    """What a store says about itself. Names follow TRIDENT's where it has one (`patch_size_level0` etc. in
    its h5).

    Sizes are in pixels, mpp in µm per pixel; `mpp` and `patch_px` are of the patches as the encoder saw them,
    `level0_*` of the slide. Where the slide failed before they were known, they are None. `reader` is what read the
    pixels, `damaged` the (x, y) of patches that could not be decoded and have no row.
    """

    slide_id: str
    cohort: str
    patch_px: int
    patch_px_level0: float | None
    mpp: float
    level0_mpp: float | None
    level0_width: int | None
    level0_height: int | None
    magnification: float
    encoder: str
    encoder_weights_sha256: str | None
    tiling_hash: str
    source: dict[str, Any] = field(hash=False)
    created_by: str
    failure: dict[str, str] | None = field(default=None, hash=False)
    reader: str | None = None
    warnings: list[str] = field(default_factory=list, hash=False)
    damaged: list[list[int]] = field(default_factory=list, hash=False)
    schema_version: str = SCHEMA_VERSION


@dataclass(frozen=True)
class SlideStore:
    """An opened, validated store.

    path        the file
    coords      (N, 2) int32, (x, y) of the top-left corner, level-0 pixels, row-major
    attributes  see StoreAttributes
    shape       (N, D) of the features
    """

    path: Path
    coords: np.ndarray
    attributes: StoreAttributes
    shape: tuple[int, int]

    @cached_property
    def features(self) -> np.ndarray:
        """(N, D) float16, row i belongs to `coords[i]`; read at the first access, then kept."""
        return self.read_features()

    def read_features(self) -> np.ndarray:
        """`features`, read from the file each time. StoreError when a value is not finite or the file is damaged."""
        try:
            features = _open_group(self.path)["features"][:]
        except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:
            raise _damaged(self.path, error) from error
        if not np.isfinite(features).all():
            rows = np.flatnonzero(~np.isfinite(features).all(axis=1))
            raise StoreError(
                f"{self.path}: features of {len(rows)} of {len(features)} patches are not finite (first: row"
                f" {rows[0]}); delete the file and encode the slide again, in fp32 if it comes back"
            )
        return features


def content_digest(path: Path) -> str:
    """Twelve hex digits for what is in a store, from the checksums that its archive keeps: no feature is read."""
    with zipfile.ZipFile(path) as archive:
        entries = sorted((entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist())
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:12]


def write_store(path: Path | str, coords: np.ndarray, features: np.ndarray, attributes: StoreAttributes) -> None:
    """Write the store of one slide, whole or not at all.

    coords (N, 2) int, features (N, D) float; cast to int32 and float16. Raises ValueError where the rows do
    not belong together or a feature is not finite in float16.
    """
    import zarr
    from zarr.core.buffer import Buffer
    from zarr.storage import MemoryStore

    coords = np.asarray(coords, np.int32)
    with np.errstate(over="ignore"):
        features = np.asarray(features, np.float16)
    if coords.ndim != 2 or coords.shape[1] != 2 or features.ndim != 2 or len(features) != len(coords):
        raise ValueError(f"{path}: coords {coords.shape}, features {features.shape}: not (N, 2) and (N, D)")
    if not np.isfinite(features).all():
        raise ValueError(f"{path}: {attributes.encoder} gave features that are not finite in float16")

    entries: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(entries), attributes=asdict(attributes))
    for name, array in {"coords": coords, "features": features}.items():
        chunks = (min(CHUNK_ROWS, max(1, array.shape[0])), max(1, array.shape[1]))
        group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=chunks)[:] = array

    # zarr's own ZipStore stamps the time of writing into every entry; this keeps equal content equal in
    # bytes.
    with replace_when_whole(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for key in sorted(entries):
            archive.writestr(zipfile.ZipInfo(key), entries[key].to_bytes())


def open_store(path: Path | str, encoder: str | None = None) -> SlideStore:
    """Open and validate the store of one slide; cheap, features are read and checked at their first access.

    `encoder`, where given, is the one that the store must be of. Raises StoreError, naming the file, for a
    file that is not a whole store, another schema version, rows that do not belong together, or a foreign
    encoder; FileNotFoundError where there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such store; encode the slide first")
    try:
        group = _open_group(path)
        attributes = dict(group.attrs)
        version = attributes.get("schema_version")
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{path}: schema version {version!r}, this program reads {SCHEMA_VERSION!r};"
                " encode the slide again with this version"
            )
        coords, features = group["coords"], group["features"]
        coords_shape, features_shape = coords.shape, features.shape
        types = (str(coords.dtype), str(features.dtype))
        coords = coords[:]
    except StoreError:
        raise
    except (zipfile.BadZipFile, OSError, KeyError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error

    if coords_shape[1:] != (2,) or len(features_shape) != 2 or coords_shape[0] != features_shape[0]:
        raise StoreError(
            f"{path}: misaligned rows, coords {coords_shape} and features {features_shape} should be (N, 2)"
            " and (N, D); delete the file and encode the slide again"
        )
    if types != ("int32", "float16"):
        raise StoreError(f"{path}: coords and features are {types}, expected int32 and float16; encode the slide again")
    try:
        read = from_dict(StoreAttributes, attributes, str(path))
    except ValueError as error:
        raise StoreError(f"{error}; encode the slide again") from error
    if encoder is not None and read.encoder != encoder:
        raise StoreError(
            f"{path}: features are of encoder {read.encoder!r}, asked for {encoder!r};"
            f" encode the slide with {encoder!r}, or ask for {read.encoder!r}"
        )
    return SlideStore(path, coords, read, features_shape)


def _open_group(path: Path) -> Any:
    import zarr
    from zarr.storage import ZipStore

    return zarr.open_group(ZipStore(path, mode="r"), mode="r")


def _damaged(path: Path, error: Exception) -> StoreError:
    return StoreError(f"{path}: no whole slide store ({error}); delete the file and encode the slide again")
