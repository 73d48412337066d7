"""The way of new slides to features, by the preprocessing command line.

Writes below the output folder what the Snakemake stages write below a cohort's:
  tiles/{slide}.npy, .json, .thumbnail.jpg, .mask.png, .geojson   and   features/{encoder}/{slide}.zarr.zip
What is there already from the same slide and settings is used again. Never imports torch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmmamba.cohort import Slide
from gmmamba.new_slides import SlidesError
from gmmamba.sheets import PREPARATION
from slidestore import StoreError, open_store
from slidestore.atomic import replace_when_whole
from slidestore.progress import progress_bar
from slidestore.warm_start import OWNER

ROOT = Path(__file__).parents[2]
COHORT = "new"  # in the records of what is prepared here
MENDABLE = "preprocessing: "  # begins what its command line says of settings that do not fit
COORDS_AND_RECORD = {"coords": ".npy", "record": ".json"}


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
        self.begin()
        problems = {}
        for slide in progress_bar(slides, desc="tiling", unit="slides"):
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
                        raise SlidesError(said.replace("set reading.reader to", "give --reader"))
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
        jobs, patches = [], {}
        for slide in slides:
            record = json.loads(self.tiles(slide.slide_id, ".json").read_text(encoding="utf-8"))
            patches[slide.slide_id] = int(record["counts"]["kept"])
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
            progress_bar(total=sum(patches.values()), desc="encoding", unit="patches") as bar,
        ):
            while run.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    run.wait(timeout=0.5)
                bar.update(max(0, self._encoded(patches) - bar.n))
            return run.returncode, self._reason("encode", "all", run.returncode)

    def _encoded(self, patches: Mapping[str, int]) -> int:
        """How many patches are encoded, of `patches` by slide: of slides that are done, or as the log says."""
        done = sum(count for slide_id, count in patches.items() if self.store(slide_id).is_file())
        said = re.findall(r"(\d+) of \d+ patches,", self._log("encode", "all").read_text(errors="replace"))
        return max(done, int(said[-1]) if said else 0)

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
        if status > 0 and lines and lines[-1].startswith(MENDABLE):
            return lines[-1].removeprefix(MENDABLE)
        return f"{stage} ended with exit status {status}, see {log}"


def _cohort_of(store: Path) -> str | None:
    """None of a store that cannot be read: its slide is encoded again in any case."""
    try:
        return open_store(store).attributes.cohort
    except StoreError:
        return None
