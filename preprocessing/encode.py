"""Stage encode: the patches of one tiled slide become features.

Reads the slide and what `tile` wrote (coords .npy, record .json). Writes the slide's store (see slidestore.store),
whole or not at all: features (N, D) float16, row i for the patch at coords[i].

How patches are read: preprocessing.patches. Reader threads run ahead of the network; the order of rows does not depend
on them. A patch that cannot be decoded has no row and stands in the attribute `damaged`.

A slide that `tile` could not tile, that cannot be opened, or of which too many patches are damaged gets a store with
N = 0 whose attribute `failure` says at which stage and why.
"""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from preprocessing import CREATED_BY
from preprocessing.encoders import Encoder, EncoderSettings
from preprocessing.errors import SlideError
from preprocessing.patches import PatchReader, ReadingSettings
from preprocessing.slide import open_slide
from preprocessing.tile import tiling_hash
from slidestore import StoreAttributes, write_store

log = logging.getLogger(__name__)


def encode_slide(
    path: Path,
    coords_path: Path,
    record_path: Path,
    settings: EncoderSettings,
    reading: ReadingSettings,
    output: Path,
    threads: int = 1,
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

    attributes = attributes_of(record, settings)
    features = np.empty((0, 0), np.float16)
    if record["status"] == "failed":
        attributes = replace(attributes, failure={"stage": "tile", "reason": record["reason"]})
    else:
        torch.set_num_threads(threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder = Encoder(settings, record["patch_px"]).to(device)
        attributes = replace(attributes, encoder_weights_sha256=encoder.weights_sha256)
        log.info("%s: %d patches, %s on %s", record["slide_id"], len(coords), settings.name, device)
        try:
            slide = open_slide(path, record["slide_id"], record["cohort"], record["level0_mpp"], record["mpp_source"])
            reader = PatchReader(slide, coords, record["patch_px"], record["mpp"], reading)
            for warning in reader.warnings:
                log.warning("%s", warning)
            features, readable, _ = encode_patches(reader, encoder, device, threads)
            attributes = replace(
                attributes, reader=reader.route, warnings=reader.warnings, damaged=coords[~readable].tolist()
            )
            coords = coords[readable]
        except SlideError as error:
            log.warning("%s", error)
            attributes = replace(attributes, failure={"stage": "encode", "reason": str(error)})
    if attributes.failure:
        coords = coords[:0]
    write_store(output, coords, features, attributes)


def encode_patches(
    reader: PatchReader, encoder: Encoder, device: torch.device, threads: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """(M, D) float16 features of the readable patches, which of all (N,) those are, and the share of the time in which
    the network waited for pixels. Raises SlideError.

    Pixels go to the device as uint8, into batches of one shape on a GPU, and nothing is read back before the end: the
    GPU never waits for more than the next batch.
    """
    batch_size, on_gpu = encoder.settings.batch_size, device.type == "cuda"
    features = torch.empty((len(reader.coords), encoder.features), dtype=torch.float16, device=device)
    readable = np.zeros(len(features), bool)
    batches = reader.batches(batch_size, threads)
    start, waited = time.monotonic(), 0.0
    # tqdm with disable=None shows its bar only where stderr is a terminal, so that logs stay readable.
    with (
        torch.inference_mode(),
        tqdm(total=len(features), unit="patch", desc=reader.slide.slide_id, disable=None) as bar,
    ):
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            waited += time.monotonic() - asked
            if batch is None:
                break
            images, rows = torch.from_numpy(batch.pixels), torch.from_numpy(batch.rows)
            if on_gpu:
                images = torch.cat([images, images.new_zeros(batch_size - len(images), *images.shape[1:])])
                images, rows = images.pin_memory().to(device, non_blocking=True), rows.to(device)
            features[rows] = encoder(images.permute(0, 3, 1, 2))[: len(rows)].to(torch.float16)
            readable[batch.rows] = True
            bar.update(len(batch.rows) + len(batch.damaged))
    found = features.cpu().numpy()[readable]
    seconds = max(time.monotonic() - start, 1e-9)
    log.info(
        "%d patches read from %s in %.1f s, %.0f a second; the network waited for pixels %.0f %% of the time",
        len(readable), reader.route, seconds, len(readable) / seconds, 100 * waited / seconds,
    )  # fmt: skip
    return found, readable, waited / seconds


def attributes_of(record: dict[str, Any], settings: EncoderSettings) -> StoreAttributes:
    """The attributes of a store, as far as the tile record and the encoder's settings say."""
    names = "slide_id cohort patch_px patch_px_level0 mpp level0_mpp level0_width level0_height magnification"
    return StoreAttributes(
        **{name: record[name] for name in names.split()},
        encoder=settings.name,
        encoder_weights_sha256=None,
        tiling_hash=record["tiling_hash"],
        source=record["source"],
        created_by=CREATED_BY,
    )
