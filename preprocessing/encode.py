"""Stage encode: the patches of one tiled slide become features.

Reads the slide and what `tile` wrote (coords .npy, record .json). Writes the slide's store (see slidestore.store),
whole or not at all: features (N, D) float16, row i for the patch at coords[i].

Each patch is read at the coarsest level that is at least as fine as the target mpp and brought to exactly patch_px
by area averaging. Reader threads run ahead of the network; the order of rows does not depend on them.

A slide that `tile` could not tile, or that breaks while it is read, gets a store with N = 0 whose attribute `failure`
says at which stage and why.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from preprocessing import CREATED_BY
from preprocessing.encoders import Encoder, EncoderSettings
from preprocessing.errors import SlideError
from preprocessing.patches import read_batches
from preprocessing.slide import Slide, open_slide
from preprocessing.tile import tiling_hash
from slidestore import StoreAttributes, write_store

log = logging.getLogger(__name__)


def encode_slide(
    path: Path, coords_path: Path, record_path: Path, settings: EncoderSettings, output: Path, threads: int = 1
) -> None:
    """Encode one tiled slide into the store `output`, on a GPU if there is one.

    `threads` is the number of CPU threads of the network, and of the readers. Features are equal from run to run for
    the same device, versions and number of threads. Raises ValueError for settings that do not fit, and where coords
    and record are not of the same tiling.
    """
    coords = np.load(coords_path)
    record = json.loads(record_path.read_text(encoding="utf-8"))
    if tiling_hash(record, coords) != record["tiling_hash"]:
        raise ValueError(f"{coords_path} and {record_path} are not of the same tiling: tile the slide again")

    features = np.empty((0, 0), np.float16)
    weights_sha256 = failure = None
    if record["status"] == "failed":
        failure = {"stage": "tile", "reason": record["reason"]}
    else:
        torch.set_num_threads(threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder = Encoder(settings, record["patch_px"]).to(device)
        weights_sha256 = encoder.weights_sha256
        log.info("%s: %d patches, %s on %s", record["slide_id"], len(coords), settings.name, device)
        try:
            slide = open_slide(path, record["slide_id"], record["cohort"], record["level0_mpp"], record["mpp_source"])
            features = encode_patches(slide, coords, record, encoder, device, threads)
        except SlideError as error:
            log.warning("%s", error)
            failure = {"stage": "encode", "reason": str(error)}
    if failure:
        coords = coords[:0]
    write_store(output, coords, features, attributes_of(record, settings, weights_sha256, failure))


def encode_patches(
    slide: Slide, coords: np.ndarray, record: dict[str, Any], encoder: Encoder, device: torch.device, threads: int
) -> np.ndarray:
    """(N, D) float16 features of the patches at `coords`, (N, 2) level-0 pixels. Raises SlideError."""
    features = np.empty((len(coords), encoder.features), np.float16)
    row = 0
    batches = read_batches(slide, coords, record["patch_px"], record["mpp"], encoder.settings.batch_size, threads)
    with torch.inference_mode(), tqdm(total=len(coords), unit="patch", desc=slide.slide_id, disable=None) as bar:
        for patches in batches:
            images = torch.from_numpy(patches).to(device).permute(0, 3, 1, 2)
            batch = encoder(images).float().cpu().numpy()
            features[row : row + len(batch)] = batch
            row += len(batch)
            bar.update(len(batch))
    return features


def attributes_of(
    record: dict[str, Any],
    settings: EncoderSettings,
    weights_sha256: str | None,
    failure: dict[str, str] | None,
) -> StoreAttributes:
    """The attributes of a store, from the tile record and the encoder."""
    names = "slide_id cohort patch_px patch_px_level0 mpp level0_mpp level0_width level0_height magnification"
    return StoreAttributes(
        **{name: record[name] for name in names.split()},
        encoder=settings.name,
        encoder_weights_sha256=weights_sha256,
        tiling_hash=record["tiling_hash"],
        source=record["source"],
        created_by=CREATED_BY,
        failure=failure,
    )
