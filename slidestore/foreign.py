"""Features that another tool extracted: TRIDENT's and CLAM's files, read, checked and put into the store's form.

trident-h5  `features` (N, D) and `coords` (N, 2) of features_*/{slide}.h5. The scale stands in the attributes of
            `coords`; `patches`, TRIDENT's patches/{slide}_patches.h5, may give them instead.
clam-h5     `features` and `coords` of h5_files/{slide}.h5. The attributes stand in `patches`, CLAM's patches/{slide}.h5
pt          a tensor (N, D), such as CLAM's pt_files/{slide}.pt. `coords` and attributes stand in `patches`, of either
            tool, whose rows are taken to be in the order of the tensor's: nothing could show that they are not.

Coordinates are level-0 pixels in all. TRIDENT says what a patch covers at level 0, and the magnifications; CLAM says
level and downsample but no scale in µm: the slide's mpp must then be given. Rows are put into the store's order.

Arrays with a leading axis of one, as some published features have, are read without it. What `slidestore.export` wrote
carries the store's attributes in one of its own, `slidestore`, and comes back as it was.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from slidestore.settings import from_dict
from slidestore.store import StoreAttributes, StoreError, write_store

# h5py and torch are imported where they are used: only what is read needs them.

FORMATS = ("trident-h5", "clam-h5", "pt")
OWN = "slidestore"  # attribute of `coords` in which our own exports keep a store's attributes, as JSON
TRIDENT = ("patch_size", "patch_size_level0", "level0_magnification", "target_magnification")
CLAM = ("patch_size", "patch_level", "downsample")
MPP_RANGE = (0.05, 5.0)
TOLERANCE = 0.3  # share by which two statements about the scale may differ


@dataclass(frozen=True)
class ForeignFiles:
    """Where the features of one slide stand, and in whose format; `patches` is the tool's file of coordinates."""

    format: str
    path: Path
    patches: Path | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} is none of {', '.join(FORMATS)}")
        if self.patches is None and self.format != "trident-h5":
            raise ValueError(
                f"{self.path}: {self.format} keeps no scale: give the tool's h5 of coordinates as `patches`"
            )

    def source(self) -> dict[str, Any]:
        """What identifies the file, in the form of a slide's (see StoreAttributes.source)."""
        return {"name": self.path.name, "size": self.path.stat().st_size, "quickhash": None, "format": self.format}


@dataclass(frozen=True)
class Scale:
    """Sizes in pixels, mpp in µm per pixel, as in StoreAttributes; the slide's size is None where no file says it."""

    patch_px: int
    patch_px_level0: float
    mpp: float
    level0_mpp: float
    level0_width: int | None
    level0_height: int | None


@dataclass(frozen=True)
class ForeignPatches:
    """coords (N, 2) int32, level-0 pixels, row-major; order (N,): their rows in the tool's file; `own`: the attributes
    of the store that was exported, if it was."""

    coords: np.ndarray
    order: np.ndarray
    scale: Scale
    own: StoreAttributes | None


def read_patches(files: ForeignFiles, level0_mpp: float | None = None) -> ForeignPatches:
    """Coordinates and scale of a slide, without its features.

    level0_mpp: the slide's own, µm per pixel of level 0, instead of what the tool's magnifications say. Raises
    StoreError, naming the file and the remedy, for what is missing, misaligned or contradicts itself.
    """
    attributes_file = files.patches or files.path
    coords = read_coords(attributes_file)
    if files.patches and files.format != "pt" and not np.array_equal(read_coords(files.path), coords):
        raise StoreError(
            f"{files.path} and {files.patches} do not have the same coordinates in the same order: extract the features"
            " again from these patches"
        )
    with h5_file(attributes_file) as file:
        attributes = dict(file["coords"].attrs)
    scale, own = scale_of(attributes, attributes_file, files.format, level0_mpp)
    check_place(coords, scale, attributes_file)
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    return ForeignPatches(coords[order], order, scale, own)


def read_features(files: ForeignFiles, patches: ForeignPatches) -> np.ndarray:
    """(N, D) float16, row i belongs to patches.coords[i].

    StoreError for another number of rows, and for values that are not finite in float16.
    """
    path = files.path
    features = read_tensor(path) if files.format == "pt" else read_dataset(path, "features")
    if features.ndim != 2 or len(features) != len(patches.coords) or not np.issubdtype(features.dtype, np.floating):
        raise StoreError(
            f"{path}: misaligned rows, features {features.shape} {features.dtype} for {len(patches.coords)}"
            " coordinates, expected (N, D) floating point: extract the features again from these patches"
        )
    with np.errstate(over="ignore"):
        half = features.astype(np.float16)
    bad = np.flatnonzero(~np.isfinite(half).all(axis=1))
    if len(bad):
        what = "beyond float16" if np.isfinite(features[bad]).all() else "not finite"
        raise StoreError(
            f"{path}: features of {len(bad)} of {len(half)} patches are {what} (first: row {bad[0]}): extract the slide"
            " again, in fp32, or exclude it"
        )
    return half[patches.order]


def import_store(
    files: ForeignFiles,
    output: Path,
    slide_id: str,
    cohort: str,
    encoder: str,
    level0_mpp: float | None,
    created_by: str,
    encoder_weights_sha256: str | None = None,
) -> None:
    """Write the store of one slide from another tool's files. Raises StoreError as `read_patches`."""
    patches = read_patches(files, level0_mpp)
    features = read_features(files, patches)
    if patches.own is None:
        attributes = foreign_attributes(patches, files, slide_id, cohort, encoder, created_by, encoder_weights_sha256)
    else:
        attributes = replace(patches.own, slide_id=slide_id, cohort=cohort, encoder=encoder)
    write_store(output, patches.coords, features, attributes)


def foreign_attributes(
    patches: ForeignPatches,
    files: ForeignFiles,
    slide_id: str,
    cohort: str,
    encoder: str,
    created_by: str,
    encoder_weights_sha256: str | None = None,
) -> StoreAttributes:
    """The attributes of a store of imported features. Where no file says the slide's size, it is taken to end where the
    patches end, and `source` says so."""
    source, scale = files.source(), patches.scale
    width, height = frame(patches)
    if (scale.level0_width, scale.level0_height) != (width, height):
        source["level0_size"] = "extent of the patches"
    known: dict[str, Any] = {"slide_id": slide_id, "source": source}
    known |= {name: getattr(scale, name) for name in ("level0_mpp", "patch_px", "mpp")}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode() + patches.coords.astype("<i4").tobytes())
    return StoreAttributes(
        cohort=cohort,
        patch_px_level0=scale.patch_px_level0,
        level0_width=width,
        level0_height=height,
        magnification=10 / scale.mpp,
        encoder=encoder,
        encoder_weights_sha256=encoder_weights_sha256,
        tiling_hash=digest.hexdigest()[:16],
        created_by=created_by,
        **known,
    )


def frame(patches: ForeignPatches) -> tuple[int, int]:
    """Width and height of the slide, level-0 pixels; where no file says them, of the area that holds all patches."""
    scale = patches.scale
    if scale.level0_width is not None and scale.level0_height is not None:
        return scale.level0_width, scale.level0_height
    width, height = np.ceil(patches.coords.max(axis=0) + scale.patch_px_level0).astype(int).tolist()
    return width, height


# Scale ---------------------------------------------------------------------------------------------------------------


def scale_of(
    attributes: Mapping[str, Any], path: Path, tool: str, level0_mpp: float | None
) -> tuple[Scale, StoreAttributes | None]:
    """Scale from the attributes of `coords`, whichever tool wrote them; and those of an exported store, if they are."""
    own = None
    if OWN in attributes:
        own = from_dict(StoreAttributes, json.loads(attributes[OWN]), f"{path}, attribute {OWN!r} of 'coords'")
        scale = Scale(**{field.name: getattr(own, field.name) for field in fields(Scale)})
    elif tool == "trident-h5" or (tool == "pt" and "patch_size_level0" in attributes):
        scale = trident_scale(attributes, path)
    else:
        scale = clam_scale(attributes, path, level0_mpp)
    if level0_mpp is not None and level0_mpp != scale.level0_mpp:
        if abs(level0_mpp / scale.level0_mpp - 1) > TOLERANCE:
            raise StoreError(
                f"{path}: level 0 has {scale.level0_mpp:g} µm/px by the tool's magnifications, the sheet or the config"
                f" says {level0_mpp:g}: mend the sheet's 'mpp', or leave it out"
            )
        mpp = level0_mpp * scale.patch_px_level0 / scale.patch_px
        scale = replace(scale, level0_mpp=level0_mpp, mpp=mpp)
        own = own and replace(own, level0_mpp=level0_mpp, mpp=mpp, magnification=10 / mpp)
    for name in ("mpp", "level0_mpp"):
        if not MPP_RANGE[0] <= getattr(scale, name) <= MPP_RANGE[1]:
            raise StoreError(
                f"{path}: {name} comes out as {getattr(scale, name):g} µm/px ({MPP_RANGE[0]} to {MPP_RANGE[1]} is"
                " plausible): check the attributes of 'coords' and the slide's mpp"
            )
    return scale, own


def trident_scale(attributes: Mapping[str, Any], path: Path) -> Scale:
    """By convention 40x is 0.25 µm/px; at level 0 the scale follows from how much a patch shrinks."""
    patch, level0, from_x, to_x = numbers(attributes, TRIDENT, path, "give TRIDENT's patches h5 as `patches`")
    if abs(level0 / patch / (from_x / to_x) - 1) > TOLERANCE:
        raise StoreError(
            f"{path}: patch_size {patch:g} is patch_size_level0 {level0:g}, but {to_x:g}x is cut from {from_x:g}x: the"
            " attributes of 'coords' contradict each other; extract the patches again"
        )
    size = [int(attributes[name]) if name in attributes else None for name in ("level0_width", "level0_height")]
    return Scale(round(patch), level0, 10 / to_x, 10 / to_x * patch / level0, *size)


def clam_scale(attributes: Mapping[str, Any], path: Path, level0_mpp: float | None) -> Scale:
    """CLAM cuts patch_size pixels of a level, and knows how much that is shrunk, but not in µm."""
    patch, _, downsample = numbers(attributes, CLAM, path, "give the h5 of CLAM's patches/ as `patches`")
    if level0_mpp is None:
        raise StoreError(
            f"{path}: CLAM records no mpp: add the slide's 'mpp' or 'magnification' to the sheet or config"
        )
    size: list[int | None] = [None, None]
    if "level_dim" in attributes:
        size = [round(float(side) * downsample) for side in attributes["level_dim"]]
    return Scale(round(patch), patch * downsample, level0_mpp * downsample, level0_mpp, *size)


def numbers(attributes: Mapping[str, Any], names: tuple[str, ...], path: Path, remedy: str) -> list[float]:
    """The attributes as numbers; of CLAM's pairs for x and y the first."""
    missing = [name for name in names if name not in attributes]
    if missing:
        raise StoreError(
            f"{path}: 'coords' has no attribute {', '.join(missing)} (it has {', '.join(attributes) or 'none'}):"
            f" {remedy}"
        )
    values = [float(np.ravel(attributes[name])[0]) for name in names]
    for name, value in zip(names, values, strict=True):
        if not (value > 0 or (name == "patch_level" and value == 0)):
            raise StoreError(f"{path}: attribute {name} of 'coords' is {value:g}: extract the patches again")
    return values


def check_place(coords: np.ndarray, scale: Scale, path: Path) -> None:
    """StoreError where a patch begins outside the slide: those are no level-0 pixels, or another slide's."""
    for i, (name, side) in enumerate(
        {"level0_width": scale.level0_width, "level0_height": scale.level0_height}.items()
    ):
        if side is not None and coords[:, i].max() >= side:
            raise StoreError(
                f"{path}: a patch begins at {'xy'[i]} = {coords[:, i].max()}, outside the slide ({name} {side}): the"
                " coordinates are another slide's, or no level-0 pixels"
            )


# Files ---------------------------------------------------------------------------------------------------------------


@contextmanager
def h5_file(path: Path) -> Iterator[Any]:
    """An HDF5 file to read. FileNotFoundError where there is none, StoreError where it is damaged or something else."""
    import h5py

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        # Without a lock where the file system has none
        file = h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        raise StoreError(f"{path}: no whole HDF5 file ({error}): copy it anew, or extract the slide again") from error
    with file:
        yield file


def read_dataset(path: Path, name: str) -> np.ndarray:
    """A dataset of an HDF5 file, without a leading axis of one before two others."""
    with h5_file(path) as file:
        if name not in file:
            raise StoreError(
                f"{path}: no dataset {name!r}, it has {', '.join(file) or 'none'}: is this the file of the features"
                " (`path`) or of the coordinates (`patches`)?"
            )
        try:
            array: np.ndarray = file[name][()]
        except OSError as error:
            raise StoreError(f"{path}: {name!r} cannot be read ({error}): copy the file anew") from error
    return array[0] if array.ndim == 3 and len(array) == 1 else array


def read_coords(path: Path) -> np.ndarray:
    """(N, 2) int32 in the file's order. StoreError for none, another shape, and what is no pixel of a slide."""
    coords = read_dataset(path, "coords")
    if coords.ndim != 2 or coords.shape[1] != 2 or not len(coords):
        raise StoreError(f"{path}: coords {coords.shape}, expected (N, 2) and at least one patch: exclude the slide")
    with np.errstate(invalid="ignore"):
        whole = coords.astype(np.int32)
    if not np.array_equal(whole, coords) or whole.min() < 0:
        raise StoreError(f"{path}: coords are not all whole level-0 pixels from 0 on: extract the patches again")
    return whole


def read_tensor(path: Path) -> np.ndarray:
    """The tensor of a .pt file; nothing else is unpickled."""
    import pickle

    import torch

    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise StoreError(f"{path}: no whole torch file of a tensor ({error}): copy it anew") from error
    if not isinstance(tensor, torch.Tensor):
        raise StoreError(f"{path} holds a {type(tensor).__name__}, expected one tensor (N, D)")
    array: np.ndarray = tensor.float().numpy()
    return array[0] if array.ndim == 3 and len(array) == 1 else array


def slide_id_of(path: Path) -> str:
    """The name of a tool's file without its ending, where that can be a slide_id."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", path.stem):
        raise StoreError(
            f"{path}: {path.stem!r} is no slide_id (letters, digits, '.', '_' and '-'): give the file a copy"
        )
    return path.stem


def own_attributes(attributes: StoreAttributes) -> str:
    """What `read_patches` finds again in an exported file."""
    return json.dumps(asdict(attributes))
