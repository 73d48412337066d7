"""New slides: which there are, and their way to features by the preprocessing command line.

Writes below the output folder what the Snakemake stages write below a cohort's:
  tiles/{slide}.npy, .json, .thumbnail.jpg, .mask.png, .geojson   and   features/{encoder}/{slide}.zarr.zip
What is there already from the same slide and settings is used again. Never imports torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from gmmamba.cohort import MASK_SUFFIXES, SAFE_ID, Slide
from gmmamba.sheets import PREPARATION, SLIDE_SUFFIXES, find_slides, safe_ids
from slidestore import StoreError, open_store
from slidestore.atomic import replace_when_whole
from slidestore.warm_start import OWNER

ROOT = Path(__file__).parents[2]
COHORT = "new"  # in the records of what is prepared here
COORDS_AND_RECORD = {"coords": ".npy", "record": ".json"}


class SlidesError(StoreError):
    """Slides that cannot be listed or prepared; the message names what, and the remedy."""


class NoSlidesError(SlidesError):
    """A folder in which there is no slide."""


def list_slides(source: Path, mpp: float | None = None) -> list[Slide]:
    """The slides to predict: of a slide's file, a folder (searched through; folders of .dcm files are slides), or a
    sheet.

    A sheet is a CSV with the column `path`, relative to it, and optional `slide_id, label, mpp, magnification, mask,
    exclude` as in a cohort's. Raises SlidesError for a source without slides and for a sheet with errors, all of them
    named by line. Files are not opened. mpp: of level 0, in µm per pixel, for slides whose row gives none.
    """
    if source.suffix.lower() == ".csv":
        return _of_sheet(source, mpp)
    if not source.exists():
        raise SlidesError(f"{source} does not exist: give a slide, a folder of slides, or a sheet (.csv)")
    if source.is_dir():
        dicom = sorted({path.parent for path in source.rglob("*.dcm")})
        paths = sorted([*find_slides(source).slides, *dicom])
    else:
        paths = [source]
    if not paths:
        raise NoSlidesError(f"{source} holds no slide ({', '.join(SLIDE_SUFFIXES)}, or folders of .dcm files)")
    ids = safe_ids([path.name for path in paths])
    return [_slide(name, path, mpp, "config") for name, path in zip(ids, paths, strict=True)]


def _slide(
    slide_id: str, path: Path, mpp: float | None, source: str, line: int = 0, label: str = "", mask: Path | None = None
) -> Slide:
    source_of_mpp = None if mpp is None else source
    return Slide(slide_id, slide_id, label, path, line, mpp, source_of_mpp, "", "", "", mask, {})


def _of_sheet(sheet: Path, general_mpp: float | None) -> list[Slide]:
    try:
        table = pd.read_csv(sheet, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise SlidesError(f"{sheet} does not exist") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise SlidesError(f"{sheet} is not a CSV file in UTF-8: {error}") from error
    if "path" not in table:
        raise SlidesError(f"{sheet} has no column 'path', but {', '.join(map(str, table.columns))}")
    rows = [(i + 2, {k: v.strip() for k, v in row.items()}) for i, row in enumerate(table.to_dict("records"))]
    rows = [(line, row) for line, row in rows if row.get("exclude", "").lower() in ("", "0", "no", "false")]
    ids = safe_ids([Path(row["path"]).name for _, row in rows])
    slides: dict[str, Slide] = {}
    problems = []
    for (line, row), from_name in zip(rows, ids, strict=True):
        slide_id, place, mpp, said_by = row.get("slide_id") or from_name, f"line {line}", general_mpp, "config"
        path, mask = sheet.parent / row["path"], sheet.parent / row["mask"] if row.get("mask") else None
        try:
            if row.get("mpp"):
                mpp, said_by = float(row["mpp"]), "sheet"
            elif row.get("magnification"):
                mpp, said_by = 10 / float(row["magnification"]), "sheet"
        except (ValueError, ZeroDivisionError):
            problems.append(f"{place}: mpp or magnification of slide {slide_id} is not a number")
        if not row["path"] or not path.exists():
            problems.append(f"{place}: slide {slide_id}: no such file: {path} (mend the path, or fill 'exclude')")
        if not SAFE_ID.fullmatch(slide_id):
            problems.append(f"{place}: slide_id {slide_id!r} must be made of letters, digits, '.', '_' and '-'")
        if slide_id in slides:
            problems.append(f"{place}: slide_id {slide_id!r} stands in line {slides[slide_id].line} already")
        if mask and (mask.suffix.lower() not in MASK_SUFFIXES or not mask.is_file()):
            problems.append(f"{place}: mask {mask} is no {', '.join(MASK_SUFFIXES)} file")
        slides[slide_id] = _slide(slide_id, path, mpp, said_by, line, row.get("label", ""), mask)
    if not rows:
        problems.append("it lists no slide")
    if problems:
        raise SlidesError(f"{sheet} cannot be used: {'; '.join(problems)}")
    return list(slides.values())


@dataclass(frozen=True)
class Preparation:
    """How slides are brought to features, and where that goes. `encoder_sha256` is what the weights must be."""

    output: Path
    tiling: Mapping[str, Any]
    reading: Mapping[str, Any]
    encoder: Mapping[str, Any]
    encoder_sha256: str
    threads: int

    def tiles(self, slide_id: str, suffix: str) -> Path:
        return self.output / "tiles" / f"{slide_id}{suffix}"

    def store(self, slide_id: str) -> Path:
        return self.output / "features" / self.encoder["name"] / f"{slide_id}.zarr.zip"

    def begin(self) -> None:
        """Forget the tiles and features that are here from other settings.

        Raises SlidesError for a folder of somebody else's, such as results/COHORT: what is in it may be days of work.
        """
        # The weights by content, not by path: the same file elsewhere makes the same features.
        encoder = {**self.encoder, "weights": self.encoder_sha256}
        settings = {"tiling": self.tiling, "reading": self.reading, "encoder": encoder}
        path, text = self.output / PREPARATION, json.dumps(settings, indent=2, sort_keys=True) + "\n"
        tiles = [*self.output.glob("tiles/*.json")]
        if not path.is_file():
            if tiles or any(self.output.glob("features/*/*.zarr.zip")):
                raise SlidesError(
                    f"{self.output} holds tiles or features that predict did not make: choose another --output"
                )
        elif path.read_text() == text:
            return
        for store in self.output.glob(f"features/{self.encoder['name']}/*.zarr.zip"):
            if _cohort_of(store) == COHORT:
                store.unlink()
        for record in tiles:
            if json.loads(record.read_text(encoding="utf-8"))["cohort"] == COHORT:
                record.unlink()
        with replace_when_whole(path) as part:
            part.write_text(text)

    def prepare(self, slides: Sequence[Slide]) -> dict[str, str]:
        """Tile and encode the slides where that is not done; what went wrong, a line each, by slide.

        Raises SlidesError where it is the encoder that cannot be used: no slide will do better.
        """
        from tqdm import tqdm  # Snakemake, which lists slides by this module, has none in its environment

        self.begin()
        problems = {}
        for slide in tqdm(slides, "tiling", unit="slide", disable=None):
            if (problem := self._tile(slide)) is not None:
                problems[slide.slide_id] = problem
        tiled = [slide for slide in slides if slide.slide_id not in problems]
        waiting = [slide for slide in tiled if not self._is_encoded(slide.slide_id)]
        # The first by itself: what is wrong with the encoder is then known before the others are encoded with it.
        for some in (waiting[:1], waiting[1:]):
            if not some:
                continue
            status, said = self._encode(some)
            for slide in some:
                store = self.store(slide.slide_id)
                if not store.is_file():
                    if status and some == waiting[:1]:
                        raise SlidesError(
                            said.removeprefix("ValueError: ").replace("set reading.reader to", "give --reader")
                        )
                    problems[slide.slide_id] = said
                elif (failure := open_store(store).attributes.failure) is not None:
                    problems[slide.slide_id] = failure["reason"]
                elif not self._is_encoded(slide.slide_id):
                    raise SlidesError(self._other_weights(open_store(store).attributes.encoder_weights_sha256 or ""))
        return problems

    def _other_weights(self, sha256: str) -> str:
        name, model, weights = (self.encoder[key] for key in ("name", "model", "weights"))
        return (
            f"the encoder {name} ({model}, weights {weights}) has other weights here ({sha256[:12]}) than in training"
            f" ({self.encoder_sha256[:12]}): take the file that training used (--encoder-weights), or the same versions"
            " of torch and timm"
        )

    def _tile(self, slide: Slide) -> str | None:
        name, record = slide.slide_id, self.tiles(slide.slide_id, ".json")
        if not self._is_tiled(slide):
            scale = [] if slide.mpp is None else ["--mpp", repr(slide.mpp), "--mpp-source", slide.mpp_source or "sheet"]
            mask = [] if slide.mask is None else [f"--tissue-mask={slide.mask}"]
            places = [
                f"--{place}={self.tiles(name, suffix)}"
                for place, suffix in {"coords": ".npy", "record": ".json", "thumbnail": ".thumbnail.jpg",
                                      "mask": ".mask.png", "contours": ".geojson"}.items()
            ]  # fmt: skip
            given = [f"--slide={slide.path}", "--slide-id", name, "--cohort", COHORT, *scale, *mask]
            with self._running("tile", name, [*given, "--settings", json.dumps(dict(self.tiling)), *places]) as run:
                if run.wait():
                    return self._reason("tile", name, run.returncode)
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["status"] == "ok":
            return None
        return str(found["reason"]).replace(f"set cohorts.{COHORT}.mpp", "give --mpp")

    def _encode(self, slides: Sequence[Slide]) -> tuple[int, str]:
        """Encode tiled slides in one process; its exit status, and why slides have no store if they have none."""
        from tqdm import tqdm

        jobs = []
        for slide in slides:
            self.store(slide.slide_id).unlink(missing_ok=True)
            tiled = {name: self.tiles(slide.slide_id, suffix) for name, suffix in COORDS_AND_RECORD.items()}
            places = {"slide": slide.path, **tiled, "output": self.store(slide.slide_id)}
            jobs.append({key: str(path) for key, path in places.items()})
        listed = self.output / "logs" / "encode.jobs.json"
        with replace_when_whole(listed) as part:
            part.write_text(json.dumps(jobs, indent=2) + "\n", encoding="utf-8")
        settings = ["--settings", json.dumps(dict(self.encoder)), "--reading", json.dumps(dict(self.reading))]
        with (
            self._running("encode", "all", [f"--jobs={listed}", *settings, "--threads", str(self.threads)]) as run,
            tqdm(total=len(slides), desc="encoding", unit="slide", disable=None) as bar,
        ):
            while True:
                try:
                    run.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    bar.update(sum(self.store(slide.slide_id).is_file() for slide in slides) - bar.n)
                else:
                    bar.update(sum(self.store(slide.slide_id).is_file() for slide in slides) - bar.n)
                    return run.returncode, self._reason("encode", "all", run.returncode)

    def picture_patches(self) -> str | None:
        """Have the pictures made of the patches that the predictions in `output` name; what went wrong, if it did."""
        with self._running("picture-patches", "all", [f"--predictions={self.output}"]) as run:
            return self._reason("picture-patches", "all", run.returncode) if run.wait() else None

    def _is_tiled(self, slide: Slide) -> bool:
        record = self.tiles(slide.slide_id, ".json")
        if not record.is_file() or slide.mask is not None:
            return False
        found = json.loads(record.read_text(encoding="utf-8"))
        files = [slide.path] if slide.path.is_file() else list(slide.path.glob("*.dcm"))
        return (
            found["status"] == "ok"
            and found["source"]["size"] in [file.stat().st_size for file in files]
            and all(file.stat().st_mtime < record.stat().st_mtime for file in files)
            and (found["mpp_source"] == "file" if slide.mpp is None else found["level0_mpp"] == slide.mpp)
        )

    def _is_encoded(self, slide_id: str) -> bool:
        record = json.loads(self.tiles(slide_id, ".json").read_text(encoding="utf-8"))
        try:
            attributes = open_store(self.store(slide_id), self.encoder["name"]).attributes
        except (StoreError, FileNotFoundError):
            return False
        hashes = attributes.tiling_hash, attributes.encoder_weights_sha256
        return attributes.failure is None and hashes == (record["tiling_hash"], self.encoder_sha256)

    @contextmanager
    def _running(self, stage: str, name: str, arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
        """One stage in a process of its own, its output in a log."""
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {OWNER: str(os.getpid()), **os.environ, "PYTHONPATH": paths}  # tiling is then imported once
        log = self._log(stage, name)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "preprocessing", stage, *arguments]
        with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as run:
            try:
                yield run
            except BaseException:
                run.kill()
                raise

    def _log(self, stage: str, name: str) -> Path:
        return self.output / "logs" / stage / f"{name}.log"

    def _reason(self, stage: str, name: str, status: int) -> str:
        """Why a stage made nothing: the error that it ended with, or, where it was killed, that, and its log."""
        log = self._log(stage, name)
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if status > 0 and lines and lines[-1].startswith("ValueError: "):  # what a user can mend
            return lines[-1]
        return f"{stage} ended with exit status {status}, see {log}"


def _cohort_of(store: Path) -> str | None:
    """None of a store that cannot be read: its slide is encoded again in any case."""
    try:
        return open_store(store).attributes.cohort
    except StoreError:
        return None
