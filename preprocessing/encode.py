"""Stage encode: the patches of tiled slides become features.

Reads each slide and what `tile` wrote of it (coords .npy, record .json). Writes its store (see slidestore.store), whole
or not at all: features (N, D) float16, row i for the patch at coords[i].

How patches are read: preprocessing.patches; how the network runs: preprocessing.network. Reader threads run ahead of
the network, into the next slides, so that it waits neither at a slide's beginning nor at its end. No batch holds
patches of two slides: a slide's store does not depend on the others, nor on the number of readers. A patch that cannot
be decoded has no row and stands in the attribute `damaged`.

A slide that `tile` could not tile, that cannot be opened, or of which too many patches are damaged gets a store with
N = 0 whose attribute `failure` says at which stage and why.
"""

import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from preprocessing import CREATED_BY
from preprocessing.encoders import Encoder, EncoderSettings
from preprocessing.errors import SettingsError, SlideError
from preprocessing.network import Network, choose_device, make_repeatable, memory_for_pixels
from preprocessing.nvjpeg import NvjpegReader, check_nvjpeg
from preprocessing.patches import Batch, Opened, PatchReader, ReadingSettings, read_ahead
from preprocessing.slide import open_slide
from preprocessing.tile import tiling_hash
from slidestore import StoreAttributes, write_store
from slidestore.progress import progress_bar

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideJob:
    """A tiled slide, and the store to write of it."""

    slide: Path  # file, or folder of a DICOM slide
    coords: Path  # .npy, from tile
    record: Path  # .json, from tile
    output: Path  # .zarr.zip


@dataclass
class SlideInWork(Opened):
    """What becomes of one job. `features` (N, D) float16, on the device, in the order in which the patches are read."""

    job: SlideJob = field(kw_only=True)
    coords: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int32))
    attributes: StoreAttributes | None = None
    features: torch.Tensor | None = None
    rows: list[np.ndarray] = field(default_factory=list)
    damaged: int = 0
    started: float = 0.0
    waited: float = 0.0  # seconds in which the network waited for pixels


def encode_slide(
    path: Path,
    coords_path: Path,
    record_path: Path,
    settings: EncoderSettings,
    reading: ReadingSettings,
    output: Path,
    threads: int = 1,
) -> None:
    """Encode one tiled slide into the store `output`: `encode_slides` of one."""
    encode_slides([SlideJob(path, coords_path, record_path, output)], settings, reading, threads)


def encode_slides(
    jobs: Sequence[SlideJob], settings: EncoderSettings, reading: ReadingSettings, threads: int = 1
) -> None:
    """Encode tiled slides, one after another, with one encoder on one device: a GPU if there is one.

    `threads` is the number of readers, and of the network's CPU threads. Features are equal from run to run for the
    same device, versions and number of threads.

    Raises ValueError for settings that do not fit. What else is wrong with a job and no property of its slide (coords
    and record that are not of the same tiling, a file that cannot be read or written) is raised when the others are
    done: the error itself where it is the only job, else ValueError for all of them.
    """
    device = choose_device()
    make_repeatable(threads)
    cv2.setNumThreads(1)  # the readers are threads already
    if reading.reader == "nvjpeg":
        check_nvjpeg(device)
    networks: dict[int, Network] = {}  # by patch_px
    writing: list[tuple[SlideJob, Future[None]]] = []
    openings = (partial(open_job, job, settings, reading, device) for job in jobs)
    pieces = read_ahead(openings, settings.batch_size, threads, memory_for_pixels(device))
    with ThreadPoolExecutor(1) as writer, closing(pieces), progress_bar(unit="patches", total=0) as bar:
        asked = time.monotonic()
        for slide, batch in pieces:
            waited = time.monotonic() - asked
            if slide.attributes is not None and slide.attributes.failure is None:
                patch_px = slide.attributes.patch_px
                if patch_px not in networks:
                    networks[patch_px] = Network(Encoder(settings, patch_px), patch_px, device)
                if not slide.started:
                    bar.set_description_str(slide.attributes.slide_id, refresh=False)
                    bar.total = (bar.total or 0) + len(slide.coords)
                encode_batch(slide, batch, networks[patch_px], waited)
                bar.update(0 if batch is None else len(batch.rows) + len(batch.damaged))
            if batch is None:
                # One store waits at most: the features of more would fill the memory.
                if len(writing) > 1:
                    writing[-2][1].exception()
                writing.append((slide.job, writer.submit(finish, slide)))
            asked = time.monotonic()
    problems = [(job, error) for job, future in writing if (error := future.exception()) is not None]
    for job, error in problems:
        if len(jobs) == 1 or not isinstance(error, (ValueError, OSError)):
            raise error
        log.error("%s: %s", job.output, error)
    if problems:
        raise SettingsError(
            f"{len(problems)} of {len(jobs)} slides were not encoded: {'; '.join(str(error) for _, error in problems)}"
        )


def open_job(job: SlideJob, settings: EncoderSettings, reading: ReadingSettings, device: torch.device) -> SlideInWork:
    """The slide, ready to be read; with its `error` where it is not."""
    slide = SlideInWork(job=job)
    try:
        coords = np.load(job.coords)
        record = json.loads(job.record.read_text(encoding="utf-8"))
        if tiling_hash(record, coords) != record["tiling_hash"]:
            raise SettingsError(f"{job.coords} and {job.record} are not of the same tiling: tile the slide again")
        slide.attributes = attributes_of(record, settings)
        if record["status"] == "failed":
            slide.attributes = replace(slide.attributes, failure={"stage": "tile", "reason": record["reason"]})
            return slide
        slide.coords = coords
        opened = open_slide(job.slide, record["slide_id"], record["cohort"], record["level0_mpp"], record["mpp_source"])
        given = (opened, coords, record["patch_px"], record["mpp"], reading)
        slide.reader = NvjpegReader(*given, device) if reading.reader == "nvjpeg" else PatchReader(*given)
        for warning in slide.reader.warnings:
            log.warning("%s", warning)
    except (SlideError, ValueError, OSError) as error:
        slide.error = error
    return slide


def encode_batch(slide: SlideInWork, batch: Batch | None, network: Network, waited: float = 0.0) -> None:
    """Add the features of a batch to the slide's, or, with None, what is known at its end.

    Nothing is read back from a GPU: it never waits for more than the next batch.
    """
    assert slide.attributes is not None
    if not slide.started:
        slide.started = time.monotonic() - waited
        slide.attributes = replace(slide.attributes, encoder_weights_sha256=network.encoder.weights_sha256)
        shape = (len(slide.coords), network.encoder.features)
        slide.features = torch.empty(shape, dtype=torch.float16, device=network.device)
        log.info(
            "%s: %d patches, %s on %s",
            slide.attributes.slide_id, len(slide.coords), slide.attributes.encoder, network.device,
        )  # fmt: skip
    slide.waited += waited
    if batch is None or slide.error is not None or slide.reader is None or slide.features is None:
        return
    slide.damaged += len(batch.damaged)
    try:
        slide.reader.check_share(slide.damaged)
    except SlideError as error:
        slide.error = error
        return
    if len(batch.rows):
        at = sum(map(len, slide.rows))
        with torch.inference_mode():
            slide.features[at : at + len(batch.rows)] = network(batch.pixels)
        slide.rows.append(batch.rows)


def finish(slide: SlideInWork) -> None:
    """Write the slide's store. Raises the error that is no property of the slide."""
    if slide.error is not None and not isinstance(slide.error, SlideError):
        raise slide.error
    assert slide.attributes is not None
    attributes, coords, features = slide.attributes, slide.coords[:0], np.empty((0, 0), np.float16)
    if slide.error is not None:
        log.warning("%s", slide.error)
        attributes = replace(attributes, failure={"stage": "encode", "reason": str(slide.error)})
    elif slide.reader is not None and slide.features is not None:
        features, readable = in_row_order(slide)
        coords = slide.coords[readable]
        attributes = replace(
            attributes,
            reader=slide.reader.route,
            warnings=slide.reader.warnings,
            damaged=slide.coords[~readable].tolist(),
        )
        seconds = max(time.monotonic() - slide.started, 1e-9)
        log.info(
            "%d patches read from %s in %.1f s, %.0f a second; the network waited for pixels %.0f %% of the time",
            len(coords), slide.reader.route, seconds, len(coords) / seconds, 100 * slide.waited / seconds,
        )  # fmt: skip
    slide.reader = slide.features = None
    write_store(slide.job.output, coords, features, attributes)


def in_row_order(slide: SlideInWork) -> tuple[np.ndarray, np.ndarray]:
    """(M, D) float16 features of the readable patches, and which of all (N,) those are."""
    assert slide.features is not None
    rows = np.concatenate([np.empty(0, np.int64), *slide.rows])
    readable = np.zeros(len(slide.coords), bool)
    readable[rows] = True
    return slide.features[: len(rows)].cpu().numpy()[np.argsort(rows)], readable


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
