"""view: serve the page on which the slides of a finished dataset are looked at.

    /                                                        the page
    /dataset.json                                            the list of slides, with what was predicted
    /slides/ID.json                                          one slide: size, layers, outlines of tissue, foci
    /slides/ID_files/LEVEL/COLUMN_ROW.jpeg                   a tile of its deep-zoom pyramid
    /slides/ID/attention/EXPERIMENT/FOLD/SEED/SCALE.png      attention of a run; SCALE is linear or rank
    /slides/ID/groups/GROUPING.png                           its groups

Only what is listed is served: a request names slides, experiments and groupings, never files. On 127.0.0.1 the server
answers only requests addressed to this machine, so that no web site can read slides through a name that points here.
"""

import json
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gmmamba.view import ViewError, layers
from gmmamba.view.dataset import ListedSlide, ViewedDataset, read_dataset
from gmmamba.view.pixels import OVERLAP_PX, TILE_PX, OpenSlides, UnreadableSlideError
from slidestore import StoreError

HERE = Path(__file__).parent
FILES = {  # all that is served from the package
    "/": ("page.html", "text/html; charset=utf-8"),
    "/view.css": ("view.css", "text/css; charset=utf-8"),
    "/view.js": ("view.js", "text/javascript; charset=utf-8"),
    "/openseadragon.js": ("openseadragon/openseadragon.min.js", "text/javascript; charset=utf-8"),
}
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # of slides, experiments and groupings: nothing that a URL would have to escape
POLICY = "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"


class NotListedError(LookupError):
    """A request for what the dataset does not have; the message is for whoever asked."""


class Viewer:
    """Answers requests about one dataset; knows nothing of HTTP."""

    def __init__(self, dataset: ViewedDataset) -> None:
        self.dataset = dataset
        self.open_slides = OpenSlides()
        self.routes: list[tuple[re.Pattern[str], Callable[..., tuple[bytes, str]]]] = [
            (re.compile(pattern), answer)
            for pattern, answer in (
                (r"/dataset\.json", self.listing),
                (rf"/slides/({NAME})\.json", self.slide),
                (rf"/slides/({NAME})_files/(\d{{1,2}})/(\d{{1,6}})_(\d{{1,6}})\.jpeg", self.tile),
                (rf"/slides/({NAME})/attention/({NAME})/(\d{{1,6}})/(\d{{1,9}})/(linear|rank)\.png", self.attention),
                (rf"/slides/({NAME})/groups/({NAME})\.png", self.groups),
            )
        ]

    def answer(self, path: str) -> tuple[bytes, str]:
        """Content and media type of a path. Raises NotListedError, UnreadableSlideError or StoreError."""
        if path in FILES:
            name, media_type = FILES[path]
            return (HERE / name).read_bytes(), media_type
        for pattern, answer in self.routes:
            if match := pattern.fullmatch(path):
                return answer(*match.groups())
        raise NotListedError("no such page")

    def listed(self, slide_id: str) -> ListedSlide:
        if slide_id not in self.dataset.slides:
            raise NotListedError(f"the dataset has no slide {slide_id}")
        return self.dataset.slides[slide_id]

    def listing(self) -> tuple[bytes, str]:
        slides = [
            {
                "slide_id": slide.slide_id, "patient_id": slide.patient_id, "cohort": slide.cohort,
                "label": slide.label, "status": slide.status, "reason": slide.reason, "no_picture": slide.no_picture(),
                "tested": [{k: v for k, v in asdict(run).items() if k != "attention"} for run in slide.tested],
            }
            for slide in self.dataset.slides.values()
        ]  # fmt: skip
        return as_json({
            "dataset": self.dataset.name, "classes": self.dataset.classes,
            "experiments": list(self.dataset.experiments), "slides": slides,
        })  # fmt: skip

    def size(self, slide: ListedSlide, patches: layers.Patches | None) -> tuple[int, int]:
        """Width and height, level-0 pixels. UnreadableSlideError where the patches are of a slide of another size."""
        if slide.path is None or slide.no_picture():
            raise UnreadableSlideError(slide.no_picture())
        width, height = self.open_slides.get(slide.path).level_dimensions[-1]
        if patches is not None and patches.width is not None and (width, height) != (patches.width, patches.height):
            raise UnreadableSlideError(
                f"{slide.path} is {width} x {height} px, the patches are of a slide of {patches.width} x "
                f"{patches.height} px: the file was replaced since, run snakemake"
            )
        return width, height

    def slide(self, slide_id: str) -> tuple[bytes, str]:
        slide = self.listed(slide_id)
        patches = layers.read_patches(slide)
        try:
            width, height = self.size(slide, patches)
        except UnreadableSlideError as error:
            return as_json({"slide_id": slide_id, "no_picture": str(error)})
        attention, groups = [], []
        if patches is not None:
            for run in slide.tested:
                if layers.read_attention(run, slide_id) is not None:
                    attention.append({"experiment": run.experiment, "fold": run.fold, "seed": run.seed})
            for grouping in dict.fromkeys(g for g in self.dataset.experiments.values() if g):
                labels = layers.read_labels(self.dataset.groups, slide, grouping)
                if labels is not None:
                    groups.append({"grouping": grouping, "centres": layers.group_centres(patches, labels)})
        levels = self.open_slides.get(slide.path).level_count if slide.path else 0
        return as_json({
            "slide_id": slide_id, "width": width, "height": height, "mpp": patches.mpp if patches else None,
            "tile_px": TILE_PX, "overlap_px": OVERLAP_PX, "max_level": levels - 1,
            "n_patches": len(patches.coords) if patches else 0, "attention": attention, "groups": groups,
            "outlines": layers.read_outlines(slide), "foci": layers.read_foci(slide),
        })  # fmt: skip

    def tile(self, slide_id: str, level: str, column: str, row: str) -> tuple[bytes, str]:
        slide = self.listed(slide_id)
        self.size(slide, None)
        assert slide.path is not None, "a slide of a size has a file"
        try:
            return self.open_slides.tile(slide.path, int(level), int(column), int(row)), "image/jpeg"
        except ValueError as error:
            raise NotListedError(f"slide {slide_id} has no tile {level}/{column}_{row}") from error

    def attention(self, slide_id: str, experiment: str, fold: str, seed: str, scale: layers.Scale) -> tuple[bytes, str]:
        slide = self.listed(slide_id)
        patches = layers.read_patches(slide)
        for run in slide.tested:
            if (run.experiment, run.fold, run.seed) == (experiment, int(fold), int(seed)) and patches is not None:
                attention = layers.read_attention(run, slide_id)
                if attention is not None:
                    size = self.size(slide, patches)
                    return layers.attention_picture(patches, size, attention, scale), "image/png"
        raise NotListedError(f"{experiment}, fold {fold}, seed {seed}, has no attention on slide {slide_id}")

    def groups(self, slide_id: str, grouping: str) -> tuple[bytes, str]:
        slide = self.listed(slide_id)
        patches = layers.read_patches(slide)
        labels = layers.read_labels(self.dataset.groups, slide, grouping)
        if patches is None or labels is None:
            raise NotListedError(f"slide {slide_id} has no groups {grouping}")
        return layers.groups_picture(patches, self.size(slide, patches), labels), "image/png"


def as_json(content: Any) -> tuple[bytes, str]:
    return json.dumps(content).encode(), "application/json"


class Server(ThreadingHTTPServer):
    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a browser no longer wants a tile that it asked for
            super().handle_error(request, client_address)


def make_server(viewer: Viewer, host: str = "127.0.0.1", port: int = 0) -> Server:
    """Bound and ready for serve_forever(). Port 0 takes any that is free.

    Raises OSError or OverflowError where the address cannot be had.
    """
    local_only = is_loopback(host)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60  # seconds that an idle connection may hold a thread

        def do_GET(self) -> None:  # http.server's name
            if local_only and not addressed_here(self.headers.get("Host", "")):
                self.reply(HTTPStatus.FORBIDDEN, b"this viewer answers only requests addressed to localhost")
                return
            try:
                content, media_type = viewer.answer(urlsplit(self.path).path)
            except NotListedError as error:
                self.reply(HTTPStatus.NOT_FOUND, str(error).encode())
            except (UnreadableSlideError, StoreError, FileNotFoundError) as error:
                self.reply(HTTPStatus.UNPROCESSABLE_ENTITY, str(error).encode())
            else:
                self.reply(HTTPStatus.OK, content, media_type)

        def reply(self, status: HTTPStatus, content: bytes, media_type: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "private, max-age=600" if media_type == "image/jpeg" else "no-cache")
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # a line a tile says nothing
            pass

    return Server((host, port), Handler)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own: localhost, ::1 or any of 127.0.0.0/8."""
    try:
        return host.lower() == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def addressed_here(host: str) -> bool:
    """Whether a Host header, with or without a port, names this machine."""
    match = re.fullmatch(r"(?:\[(?P<v6>[^\]]+)\]|(?P<name>[^:]+))(?::\d+)?|(?P<bare>::1)", host.strip())
    return match is not None and is_loopback(match["v6"] or match["name"] or match["bare"])


def view(folder: Path, host: str, port: int) -> None:
    """Serve until interrupted; see the module. Raises FileNotFoundError where the dataset has no report yet."""
    viewer = Viewer(read_dataset(folder))
    try:
        server = make_server(viewer, host, port)
    except (OSError, OverflowError) as error:
        raise ViewError(
            f"cannot serve on {host}, port {port} ({error}): choose others with --host and --port"
        ) from error
    with server:
        address = f"http://{f'[{host}]' if ':' in host else host}:{server.server_address[1]}/"
        print(f"{address}  (end with Ctrl-C)", flush=True)
        if not is_loopback(host):
            print(f"Everyone who reaches {host} can look at these slides: there is no password.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
