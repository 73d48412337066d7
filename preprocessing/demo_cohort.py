"""The demo cohort: small H&E-like slides, drawn by the project itself, with known tumour foci.

Writes
    OUT/slides/<slide_id>.svs   pyramidal JPEG TIFF in Aperio's form: 20x, 0.5 µm/px, two levels and a thumbnail
    OUT/foci.csv                slide_id,x,y,radius_px: the truth, centre and radius in level-0 pixels
    OUT/slides.csv              slide_id,patient_id,label,path,mpp: the slide sheet, written last

Every slide shows glands in fibrous stroma, aggregates of lymphocytes (small, round, dark) and two or three sites
without glands. In a `normal` slide these sites are plain stroma; in a `tumour` slide each is a focus of crowded, large,
irregular, dark nuclei. Nothing else depends on the label: the stain is the patient's, all the rest the slide's.
Four slides are odd on purpose: one has no mpp in its file (the sheet gives it), one file is cut off in the middle, one
has a ring of felt-tip pen, one holds a mere sliver of tissue.

A slide is painted as two maps of stain concentration, haematoxylin and eosin, and exposed by Beer-Lambert's law:
RGB = glass * exp(-(H * haematoxylin + E * eosin)). Lengths are in level-0 pixels.
"""

import csv
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import tifffile
from tqdm import tqdm

from slidestore.atomic import replace_when_whole

MPP = 0.5  # µm per level-0 pixel
OBJECTIVE_POWER = 20
LABELS = ("normal", "tumour")
ODDITIES = {"normal": ("truncated", "sliver", "pen"), "tumour": ("no_mpp",)}  # in the first slides of each label
FEWEST_SLIDES = 6  # of which three are normal, room for the oddities

# Absorbance (R, G, B) of one unit of stain: the reference vectors of Macenko et al., ISBI 2009.
HAEMATOXYLIN = np.array([0.5626, 0.7201, 0.4062], np.float32)
EOSIN = np.array([0.2159, 0.8012, 0.5581], np.float32)
INK = np.array([1.9, 0.95, 0.25], np.float32)  # of a blue felt-tip pen
GLASS = np.array([245, 244, 246], np.float32)  # RGB of bare glass
NUCLEUS_UNIT = np.float32(100)  # grey levels of the nuclei layer a unit of haematoxylin

Array = np.ndarray
Disc = tuple[float, float, float]  # x, y, radius


@dataclass(frozen=True)
class PlannedSlide:
    """One slide before it is painted; oddity is "" or one of ODDITIES."""

    slide_id: str
    patient_id: str
    label: str
    oddity: str
    seed: tuple[int, int]
    patient_seed: tuple[int, int]  # of what the patient's slides share: the stain


def make_demo_cohort(out: Path, slides: int = 30, seed: int = 0) -> None:
    """Paint the cohort into the folder `out`; the same seed gives the same pixels.

    The sheet is written last: a cohort that was interrupted has none. Raises ValueError for too few slides.
    """
    if slides < FEWEST_SLIDES:
        raise ValueError(f"slides={slides}: the demo cohort needs {FEWEST_SLIDES} or more, four are odd on purpose")
    sheet = out / "slides.csv"
    sheet.unlink(missing_ok=True)  # of an earlier cohort, whose slides are about to be overwritten
    plan = plan_cohort(slides, seed)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        painted = pool.map(paint_file, plan, [out / "slides"] * len(plan))
        truth = [row for foci in tqdm(painted, "painting the demo cohort", len(plan), unit="slide") for row in foci]
    rows = [
        (s.slide_id, s.patient_id, s.label, f"slides/{s.slide_id}.svs", MPP if s.oddity == "no_mpp" else "")
        for s in plan
    ]
    write_csv(out / "foci.csv", ("slide_id", "x", "y", "radius_px"), truth)
    write_csv(sheet, ("slide_id", "patient_id", "label", "path", "mpp"), rows)


def paint_file(slide: PlannedSlide, folder: Path) -> list[tuple[str, int, int, int]]:
    """Paint one slide into `folder`; returns its foci as rows of foci.csv."""
    cv2.setNumThreads(1)  # a process a core
    pixels, foci = paint_slide(slide)
    with replace_when_whole(folder / f"{slide.slide_id}.svs") as part:
        write_aperio(part, pixels, None if slide.oddity == "no_mpp" else MPP)
        if slide.oddity == "truncated":
            with part.open("r+b") as file:
                file.truncate(part.stat().st_size * 2 // 5)
    return [(slide.slide_id, round(x), round(y), round(radius)) for x, y, radius in foci]


def plan_cohort(slides: int, seed: int) -> list[PlannedSlide]:
    """Patients, labels and oddities, in random order; one patient in five has two slides, the labels are balanced."""
    patients = slides - slides // 6
    owners = [*range(patients), *range(slides - patients)]
    oddities = {label: list(names) for label, names in ODDITIES.items()}
    plan = []
    for number, k in enumerate(np.random.default_rng([seed, 0]).permutation(slides), start=1):
        owner = owners[k]
        label = LABELS[owner % 2]
        oddity = oddities[label].pop(0) if oddities[label] else ""
        seeds = (seed, number), (seed, 10_000 + owner)
        plan.append(PlannedSlide(f"demo_{number:02d}", f"patient_{owner + 1:02d}", label, oddity, *seeds))
    return plan


def paint_slide(slide: PlannedSlide) -> tuple[Array, list[Disc]]:
    """One slide: RGB uint8 (height, width, 3), and its foci."""
    rng = np.random.default_rng(slide.seed)
    height, width = (256 * rng.integers(9, 12, 2)).tolist()
    glass = GLASS * np.float32(rng.uniform(0.985, 1.01))
    tissue = tissue_outline(rng, height, width, sliver=slide.oddity == "sliver")

    # The layout is drawn before the label is looked at; glands fill what room the rest leaves.
    taken: list[Disc] = []
    sites = place_discs(rng, tissue, taken, int(rng.choice([2, 2, 3])), (102, 126), gap=250)
    aggregates = place_discs(rng, tissue, taken, int(rng.integers(0, 9)), (40, 75), gap=60)
    glands = place_discs(rng, tissue, taken, 400, (62, 120), gap=rng.uniform(12, 80))
    foci = sites if slide.label == "tumour" else []

    canvas = Canvas(rng, height, width)
    canvas.spindle_nuclei(per_mm2=rng.uniform(600, 2400))
    canvas.lymphocytes(scatter(rng, height, width, per_mm2=rng.uniform(50, 800)))
    for aggregate in aggregates:
        canvas.lymphocytes(crowd(rng, aggregate, spacing=13, keep=0.85))
    for gland in glands:
        canvas.gland(gland)
    for focus in foci:
        canvas.focus(focus)

    hue = np.random.default_rng(slide.patient_seed)
    haematoxylin = HAEMATOXYLIN * hue.uniform(0.83, 1.17) * hue.normal(1, 0.03, 3)
    eosin = EOSIN * hue.uniform(0.8, 1.2) * hue.normal(1, 0.04, 3)
    stained = cv2.GaussianBlur(canvas.stains() * tissue[..., None], (0, 0), 0.8)  # the objective's blur
    density = cv2.transform(stained, np.stack([haematoxylin, eosin], axis=1))
    if slide.oddity == "pen":
        density = density + pen_ring(rng, height, width)[..., None] * INK
    noise = 1.6 * rng.standard_normal((height, width, 1), np.float32)  # the scanner's
    return np.clip(np.exp(-density) * glass + noise, 0, 255).astype(np.uint8), foci


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Array:
    """Gaussian noise of unit variance and correlation length `sigma`, float32 of `shape`, (height, width)."""
    step = max(1, int(sigma / 2))  # a field that is smooth over many pixels needs few samples
    small = rng.standard_normal([side // step + 2 for side in shape], np.float32)
    blurred = cv2.GaussianBlur(small, (0, 0), sigma / step)
    return cv2.resize(blurred / blurred.std(), shape[::-1], interpolation=cv2.INTER_CUBIC)


def tissue_outline(rng: np.random.Generator, height: int, width: int, sliver: bool) -> Array:
    """How much of each pixel is tissue, float32 (height, width) in 0-1: one or two ragged pieces, or a sliver."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    ragged = 0.10 * smooth_noise(rng, (height, width), 60) + 0.025 * smooth_noise(rng, (height, width), 8)
    if sliver:
        return np.clip((1 - np.hypot((x + 0.3 * y) / 0.35, (y - 0.2 * x) / 0.07) + ragged) / 0.03, 0, 1)
    field = smooth_noise(rng, (height, width), 280) - 2.2 * np.hypot(x, y) ** 3 + ragged
    field -= np.quantile(field[::16, ::16], 1 - rng.uniform(0.5, 0.66))
    glass_margin = np.minimum(1 - np.abs(x), 1 - np.abs(y)) * 12 - 0.6 + 3 * ragged
    return np.clip(np.minimum(field, glass_margin) / 0.04, 0, 1)


def pen_ring(rng: np.random.Generator, height: int, width: int) -> Array:
    """Strength of the ink, float32 (height, width): a ring that does not quite close."""
    ring = np.zeros((height, width), np.uint8)
    centre = (int(width * rng.uniform(0.35, 0.65)), int(height * rng.uniform(0.35, 0.65)))
    cv2.ellipse(ring, centre, (width // 5, height // 6), 20, 25, 370, 255, 46, cv2.LINE_AA)
    return cv2.GaussianBlur(ring / np.float32(255), (0, 0), 4) * (1 + 0.12 * smooth_noise(rng, (height, width), 40))


def place_discs(
    rng: np.random.Generator, tissue: Array, taken: list[Disc], count: int, radii: tuple[float, float], gap: float
) -> list[Disc]:
    """Up to `count` discs inside the tissue and `gap` away from those `taken`, to which they are added."""
    inside = np.pad(tissue[::8, ::8] > 0.5, 1).astype(np.uint8)  # tissue ends where the slide ends
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, 5)[1:-1, 1:-1] * 8
    placed: list[Disc] = []
    for _ in range(max(2000, 40 * count)):
        if len(placed) == count:
            break
        x, y, radius = rng.uniform(0, tissue.shape[1]), rng.uniform(0, tissue.shape[0]), rng.uniform(*radii)
        fits = depth[int(y) // 8, int(x) // 8] > radius + 15
        if fits and all((x - a) ** 2 + (y - b) ** 2 > (radius + c + gap) ** 2 for a, b, c in taken):
            placed.append((x, y, radius))
            taken.append(placed[-1])
    return placed


def scatter(rng: np.random.Generator, height: int, width: int, per_mm2: float) -> Array:
    """Centres (n, 2), (x, y), strewn evenly, `per_mm2` to the square millimetre."""
    return rng.uniform(0, (width, height), (int(per_mm2 * height * width * (MPP / 1000) ** 2), 2))


def crowd(rng: np.random.Generator, disc: Disc, spacing: float, keep: float) -> Array:
    """Centres (n, 2), (x, y), about `spacing` apart within a ragged disc; `keep` is the share that is not left out."""
    x, y, radius = disc
    row, column = np.mgrid[-radius : radius : spacing * 0.87, -radius:radius:spacing]
    column[1::2] += spacing / 2
    points = np.stack([column.ravel(), row.ravel()], -1) + rng.normal(0, 0.21 * spacing, (row.size, 2))
    turn, phase = np.arctan2(points[:, 1], points[:, 0]), rng.uniform(0, 2 * np.pi, 2)
    reach = radius * (0.88 + 0.14 * np.cos(2 * turn + phase[0]) + 0.11 * np.cos(5 * turn + phase[1]))
    inside = np.hypot(*points.T) < reach * np.where(rng.random(len(points)) < 0.25, 1.15, 0.95)  # a frayed rim
    return points[inside & (rng.random(len(points)) < keep)] + (x, y)


class Canvas:
    """The stains of a slide while it is painted, all (height, width).

    eosin, haematoxylin: float32 concentrations of everything but nuclei. nuclei: uint8, NUCLEUS_UNIT grey levels a unit
    of haematoxylin, a layer of its own because OpenCV draws smooth edges in uint8 only.
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        """Fibrous stroma: noise smeared along the direction of the fibres, with clefts between the bundles."""
        self.rng, self.nuclei = rng, np.zeros((height, width), np.uint8)
        self.chromatin = 1 + 0.16 * smooth_noise(rng, (height, width), 1.3)
        # The angle of the fibres, in radians: a slow swirl with a wave in it.
        self.direction = 1.6 * smooth_noise(rng, (height, width), 220) + 0.35 * smooth_noise(rng, (height, width), 22)
        half = (height // 2, width // 2)  # is fine enough for fibres
        angle = cv2.resize(self.direction, half[::-1])
        noise = smooth_noise(rng, half, 0.9)
        y, x = np.indices(half, np.float32)
        fibres = np.zeros_like(noise)
        for step in range(-14, 15, 2):
            along = x + step * np.cos(angle), y + step * np.sin(angle)
            fibres += cv2.remap(noise, *along, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        fibres = cv2.resize(fibres / fibres.std(), (width, height), interpolation=cv2.INTER_CUBIC)
        density = smooth_noise(rng, (height, width), 70)
        bundle = 1 - 0.85 * np.clip((-fibres - 0.9 - 0.5 * density) / 0.6, 0, 1)  # loose stroma gapes
        self.eosin = np.maximum(0.46 + 0.09 * fibres + 0.06 * density, 0.05) * bundle
        self.haematoxylin = np.maximum(0.07 + 0.02 * fibres, 0) * bundle

    def stains(self) -> Array:
        """float32 (height, width, 2): haematoxylin with the nuclei and their chromatin, and eosin."""
        haematoxylin = self.haematoxylin + self.nuclei / NUCLEUS_UNIT * self.chromatin
        return np.stack([haematoxylin, self.eosin * np.where(self.nuclei > 0, np.float32(0.5), 1)], axis=-1)

    def draw_nuclei(self, centres: Array, axes: Array, angles: Array, depth: Array, ragged: float) -> None:
        """Draw n nuclei, each with a darker membrane.

        centres (n, 2), half axes (n, 2), angles (n,) of the first axis in radians, depth (n,) in units of haematoxylin;
        `ragged` is the relative size of the dents in the outline.
        """
        turn = np.linspace(0, 2 * np.pi, 16, endpoint=False)
        phase = self.rng.uniform(0, 2 * np.pi, (2, len(centres), 1))
        dents = 1 + ragged * (np.cos(2 * turn + phase[0]) + np.cos(3 * turn + phase[1]))
        u, v = axes[:, :1] * dents * np.cos(turn), axes[:, 1:] * dents * np.sin(turn)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        outlines = centres[:, None] + np.stack([u * cos - v * sin, u * sin + v * cos], -1)
        for outline, grey in zip(np.rint(outlines * 8).astype(np.int32), depth * NUCLEUS_UNIT, strict=True):
            cv2.fillPoly(self.nuclei, [outline], 0.85 * float(grey), cv2.LINE_AA, shift=3)
            cv2.polylines(self.nuclei, [outline], True, float(grey), 1, cv2.LINE_AA, shift=3)

    def spindle_nuclei(self, per_mm2: float) -> None:
        """Fibroblasts: thin nuclei that lie along the fibres."""
        centres = scatter(self.rng, *self.nuclei.shape, per_mm2)
        n, (column, row) = len(centres), centres.astype(int).T
        axes = np.stack([self.rng.uniform(6, 12, n), self.rng.uniform(1.8, 3.4, n)], -1)
        angles = self.direction[row, column] + self.rng.normal(0, 0.15, n)
        self.draw_nuclei(centres, axes, angles, self.rng.uniform(0.7, 1.25, n), ragged=0.05)

    def lymphocytes(self, centres: Array) -> None:
        """Small, round, dark nuclei with hardly any cytoplasm, at (n, 2) `centres`."""
        n = len(centres)
        axes = self.rng.uniform(4.2, 5.4, (n, 1)) * self.rng.uniform(0.9, 1.1, (n, 2))
        self.draw_nuclei(centres, axes, self.rng.uniform(0, np.pi, n), self.rng.uniform(1.1, 1.5, n), ragged=0.03)

    def gland(self, disc: Disc) -> None:
        """A gland cut across: basement membrane, columnar cells with basal nuclei and mucus, and a lumen."""
        rng = self.rng
        x, y, radius = disc
        left, top, extent = int(x - radius) - 6, int(y - radius) - 6, int(2 * radius) + 13
        box, centre = np.s_[top : top + extent, left : left + extent], np.array([x - left, y - top])
        size, points = self.nuclei[box].shape, 120  # points along the wall
        turn = np.linspace(0, 2 * np.pi, points, endpoint=False)
        phase, stretch, tilt = rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.55, 1), rng.uniform(0, np.pi)
        wall = radius * (0.87 + 0.07 * np.cos(2 * turn + phase[0]) + 0.06 * np.cos(3 * turn + phase[1]))
        ring = wall[:, None] * np.stack([np.cos(turn), stretch * np.sin(turn)], -1)
        ring = ring @ np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        to_centre = np.hypot(*ring.T)[:, None]
        outward = ring / to_centre
        cell_height = rng.uniform(34, 44) * (1 + 0.1 * np.cos(7 * turn + phase[2]))[:, None]
        lumen = outward * np.maximum(to_centre - cell_height, 5)

        def filled(outline: Array, soften: float) -> Array:
            mask = np.zeros(size, np.uint8)
            cv2.fillPoly(mask, [np.rint((outline + centre) * 8).astype(np.int32)], 255, cv2.LINE_AA, shift=3)
            return cv2.GaussianBlur(mask / np.float32(255), (0, 0), soften)

        membrane, body, hollow = filled(ring * 1.05, 1.5), filled(ring, 1), filled(lumen, 1.2)
        speckle = smooth_noise(rng, size, 3)
        goblets = np.zeros(size, np.uint8)
        cells = int(np.hypot(*np.diff(ring, axis=0, append=ring[:1]).T).sum() / rng.uniform(9.5, 11.5))
        at = (np.linspace(0, points, cells, endpoint=False) + rng.normal(0, 0.25, cells)).astype(int) % points
        for k in at[rng.random(cells) < rng.uniform(0.1, 0.5)]:  # goblet cells
            goblet = np.rint(ring[k] - outward[k] * rng.uniform(22, 27) + centre)
            cv2.circle(goblets, (int(goblet[0]), int(goblet[1])), int(rng.integers(4, 7)), 255, -1)
        mucus = cv2.GaussianBlur(goblets / np.float32(255), (0, 0), 1.2)
        for layer, fibre, cytoplasm, content, washed_out in (
            (self.eosin[box], 0.52, 0.34 + 0.05 * speckle, rng.choice([0.02, 0.02, 0.16]), 0.7),
            (self.haematoxylin[box], 0.08, 0.17 + 0.03 * speckle, 0.02, 0.45),
        ):
            layer += 0.8 * membrane * (fibre - layer)
            layer += body * (cytoplasm - layer)
            layer += hollow * (content + 0.02 * speckle - layer)
            layer *= 1 - washed_out * mucus

        self.nuclei[box][body > 0.3] = 0  # those of the stroma
        axes = np.stack([rng.uniform(6.2, 9, cells), rng.uniform(3.6, 4.8, cells)], -1)
        angles = np.arctan2(outward[at, 1], outward[at, 0]) + rng.normal(0, 0.12, cells)
        basal = (x, y) + ring[at] - outward[at] * rng.uniform(9, 15, (cells, 1))
        self.draw_nuclei(basal, axes, angles, rng.uniform(0.8, 1.2, cells), ragged=0.04)

    def focus(self, disc: Disc) -> None:
        """A focus of tumour: crowded, large, dark nuclei of every shape, some with a nucleolus, in a purple ground."""
        rng = self.rng
        centres = crowd(rng, disc, spacing=16.5, keep=0.96)
        ground = np.zeros(self.nuclei.shape, np.uint8)
        for x, y in np.rint(centres).astype(int).tolist():
            cv2.circle(ground, (x, y), 14, 255, -1)
        x, y, reach = int(disc[0]), int(disc[1]), int(1.4 * disc[2]) + 20
        box = np.s_[max(y - reach, 0) : y + reach, max(x - reach, 0) : x + reach]
        body = cv2.GaussianBlur(ground[box] / np.float32(255), (0, 0), 3)
        speckle = smooth_noise(rng, body.shape, 3)
        for layer, cytoplasm in ((self.eosin[box], 0.4), (self.haematoxylin[box], 0.4)):
            layer += body * (cytoplasm + 0.055 * speckle - layer)
        self.nuclei[box][body > 0.4] = 0
        n = len(centres)
        axes = rng.uniform(6.5, 11.5, (n, 1)) * np.stack([np.ones(n), rng.uniform(0.6, 1, n)], -1)
        depth, some = rng.uniform(1.3, 2.1, n), rng.random(n) < 0.4
        self.draw_nuclei(centres, axes, rng.uniform(0, np.pi, n), depth, ragged=0.09)
        nucleoli = centres[some] + rng.normal(0, 2, (some.sum(), 2))
        self.draw_nuclei(nucleoli, np.full(nucleoli.shape, 1.8), np.zeros(len(nucleoli)), depth[some] + 0.4, ragged=0)


def write_aperio(path: Path, pixels: Array, mpp: float | None) -> None:
    """Write RGB `pixels` as OpenSlide knows Aperio's slides: two levels (the second 4x smaller) in 256 px JPEG tiles,
    between them a thumbnail in strips, and descriptions that begin with "Aperio"."""
    height, width = pixels.shape[:2]
    title = f"Aperio Image Library, drawn by gmmamba\r\n{width}x{height}"
    scale = f"AppMag = {OBJECTIVE_POWER}" + (f"|MPP = {mpp}" if mpp else "")
    with tifffile.TiffWriter(path) as tiff:
        for downsample, layout in ((1, {"tile": (256, 256)}), (8, {"rowsperstrip": 16}), (4, {"tile": (256, 256)})):
            size = width // downsample, height // downsample
            tiff.write(
                cv2.resize(pixels, size, interpolation=cv2.INTER_AREA),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 85},
                description=f"{title} -> {size[0]}x{size[1]}|{scale}",
                metadata=None,
                **layout,
            )


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write rows under a header, whole or not at all."""
    with replace_when_whole(path) as part, part.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
