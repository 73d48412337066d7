"""The demo cohort: small H&E-like slides, drawn by the project itself, with known tumour foci.

Writes
    OUT/slides/<slide_id>.svs   pyramidal JPEG TIFF in Aperio's form, 20x, 0.5 µm/px, two levels and a thumbnail
    OUT/foci.csv                slide_id,x,y,radius_px: the truth, centre and radius in level-0 pixels
    OUT/slides.csv              slide_id,patient_id,label,path,mpp: the slide sheet, written last

Every slide shows glands with a lumen in fibrous stroma, a few aggregates of lymphocytes (small, round, dark) and
patches of fibrosis without glands. A `tumour` slide has in addition two to four foci, 2-8 % of its patches:
crowded, large, irregular, dark nuclei without gland structure. Nothing else depends on the label: stain belongs to
the patient; outline, cellularity and lymphocytes are drawn before the label is looked at.

Four slides are odd on purpose: one has no mpp in its file (the sheet gives it), one is cut off in the middle, one
has a ring of felt-tip pen, one holds a mere sliver of tissue.

The slide is painted as two concentration maps, haematoxylin and eosin, and turned into light by Beer-Lambert's law:
RGB = light * exp(-(H * haematoxylin + E * eosin)).
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile
from tqdm import tqdm

from slidestore.atomic import replace_when_whole

MPP = 0.5  # µm per level-0 pixel
OBJECTIVE_POWER = 20
LABELS = ("normal", "tumour")
FEWEST_SLIDES = 6  # room for the oddities and for both labels

# Absorbance (R, G, B) of one unit of stain: the reference vectors of Macenko et al., ISBI 2009.
HAEMATOXYLIN = np.array([0.5626, 0.7201, 0.4062], np.float32)
EOSIN = np.array([0.2159, 0.8012, 0.5581], np.float32)
LIGHT = np.array([245, 244, 246], np.float32)  # bare glass
NUCLEUS_UNIT = 100.0  # grey levels of the nuclei layer per unit of haematoxylin

Array = np.ndarray


@dataclass(frozen=True)
class PlannedSlide:
    """One slide before it is painted; oddity is "", "no_mpp", "truncated", "pen" or "sliver"."""

    slide_id: str
    patient_id: str
    label: str
    oddity: str
    seed: tuple[int, int]  # of the slide
    patient_seed: tuple[int, int]  # of what the patient's slides share


@dataclass(frozen=True)
class Stain:
    """How strongly, and in which hue, one patient's slides are stained."""

    haematoxylin: Array  # (3,) absorbance of one unit
    eosin: Array  # (3,)

    @classmethod
    def of_patient(cls, rng: np.random.Generator) -> "Stain":
        return cls(
            HAEMATOXYLIN * rng.uniform(0.9, 1.1) * (1 + rng.normal(0, 0.03, 3).astype(np.float32)),
            EOSIN * rng.uniform(0.85, 1.15) * (1 + rng.normal(0, 0.04, 3).astype(np.float32)),
        )


def make_demo_cohort(out: Path, slides: int = 30, seed: int = 0) -> None:
    """Paint the cohort into the folder `out`; the same seed gives the same pixels.

    The sheet, `out`/slides.csv, is written last: a cohort that was interrupted has none. Raises ValueError for fewer
    slides than the oddities need.
    """
    if slides < FEWEST_SLIDES:
        raise ValueError(f"slides={slides}: the demo cohort needs at least {FEWEST_SLIDES} (four of them are odd on purpose)")
    sheet = out / "slides.csv"
    sheet.unlink(missing_ok=True)  # of an earlier cohort, whose slides are about to be overwritten
    (out / "slides").mkdir(parents=True, exist_ok=True)
    plan = plan_cohort(slides, seed)
    truth: list[Sequence[object]] = []
    for slide in tqdm(plan, desc="painting the demo cohort", unit="slide"):
        pixels, foci = paint_slide(slide)
        path = out / "slides" / f"{slide.slide_id}.svs"
        with replace_when_whole(path) as part:
            write_aperio(part, pixels, slide.slide_id, MPP if slide.oddity != "no_mpp" else None)
            if slide.oddity == "truncated":
                with part.open("r+b") as file:
                    file.truncate(part.stat().st_size * 2 // 5)
        truth += [(slide.slide_id, round(x), round(y), round(radius)) for x, y, radius in foci]
    write_csv(out / "foci.csv", ("slide_id", "x", "y", "radius_px"), truth)
    write_csv(
        sheet,
        ("slide_id", "patient_id", "label", "path", "mpp"),
        [(s.slide_id, s.patient_id, s.label, f"slides/{s.slide_id}.svs", MPP if s.oddity == "no_mpp" else "") for s in plan],
    )


def plan_cohort(slides: int, seed: int) -> list[PlannedSlide]:
    """Patients, labels and oddities: every fifth patient has two slides, the labels are balanced, the order is random."""
    rng = np.random.default_rng([seed, 0])
    patients = slides - slides // 6
    of_patient = [*range(patients), *range(slides - patients)]
    order = rng.permutation(slides)
    oddities = {"normal": ["truncated", "sliver", "pen"], "tumour": ["no_mpp"]}
    plan = []
    for i, k in enumerate(order):
        patient = of_patient[k]
        label = LABELS[patient % 2]
        oddity = oddities[label].pop() if oddities[label] else ""
        plan.append(
            PlannedSlide(
                f"demo_{i + 1:02d}", f"patient_{patient + 1:02d}", label, oddity, (seed, 1 + i), (seed, 10_000 + patient)
            )
        )
    return plan


# ---- painting -------------------------------------------------------------------------------------------------------


def paint_slide(slide: PlannedSlide) -> tuple[Array, list[tuple[float, float, float]]]:
    """One slide: RGB uint8 (height, width, 3), and its foci as (x, y, radius) in level-0 pixels."""
    rng = np.random.default_rng(slide.seed)
    stain = Stain.of_patient(np.random.default_rng(slide.patient_seed))
    height, width = (int(v) for v in rng.integers(9, 12, 2) * 256)
    tissue = tissue_outline(rng, height, width, sliver=slide.oddity == "sliver")

    # What a slide holds, drawn alike for both labels. Aggregates and fibrosis take the room of glands as foci do.
    lymphocytes_per_mm2, gland_room, spindles_per_mm2 = rng.uniform(100, 500), rng.uniform(14, 50), rng.uniform(900, 1800)
    wanted = [(int(rng.integers(1, 5)), 40, 70), (int(rng.integers(1, 4)), 60, 110)]
    wanted.insert(0, (int(rng.integers(2, 4)) if slide.label == "tumour" else 0, 95, 125))
    places: list[tuple[float, float, float]] = []
    kinds = [place_discs(rng, tissue, places, count, low, high, gap=60) for count, low, high in wanted]
    foci, aggregates, _ = kinds
    glands = place_discs(rng, tissue, places, 400, 62, 120, gap=gland_room)

    direction = fibre_direction(rng, height, width)
    eosin, haematoxylin = stroma(rng, direction, tissue)
    nuclei = np.zeros((height, width), np.uint8)
    spindle_nuclei(rng, nuclei, direction, spindles_per_mm2)
    lymphocytes(rng, nuclei, scatter(rng, height, width, lymphocytes_per_mm2))
    for x, y, radius in aggregates:
        lymphocytes(rng, nuclei, crowd(rng, x, y, radius, spacing=13, keep=0.85))
    for gland in glands:
        paint_gland(rng, gland, eosin, haematoxylin, nuclei)
    for focus in foci:
        paint_focus(rng, focus, eosin, haematoxylin, nuclei)

    chromatin = 1 + 0.16 * smooth_noise(rng, height, width, 1.3)
    haematoxylin += nuclei.astype(np.float32) / NUCLEUS_UNIT * chromatin
    eosin *= 1 - 0.5 * (nuclei > 0)
    for layer in (haematoxylin, eosin):
        layer *= tissue
        cv2.GaussianBlur(layer, (0, 0), 0.8, dst=layer)  # the objective's blur
    return expose(rng, stain, haematoxylin, eosin, pen=slide.oddity == "pen"), foci


def smooth_noise(rng: np.random.Generator, height: int, width: int, sigma: float) -> Array:
    """Gaussian noise of unit variance and correlation length `sigma` (pixels), float32 (height, width)."""
    step = max(1, int(sigma / 2))  # a field that is smooth over many pixels needs few of them
    small = rng.standard_normal((height // step + 2, width // step + 2), np.float32)
    small = cv2.GaussianBlur(small, (0, 0), sigma / step)
    small /= small.std()
    return small if step == 1 and small.shape == (height, width) else cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def tissue_outline(rng: np.random.Generator, height: int, width: int, sliver: bool) -> Array:
    """How much of each pixel is tissue, float32 in 0..1: one to three blobs with a ragged edge, or a sliver."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    ragged = 0.10 * smooth_noise(rng, height, width, 60) + 0.025 * smooth_noise(rng, height, width, 8)
    if sliver:
        field = 1 - np.hypot((x + 0.3 * y) / 0.35, (y - 0.2 * x) / 0.07) + ragged
        return np.clip(field / 0.03, 0, 1)
    field = smooth_noise(rng, height, width, 280) - 2.2 * np.hypot(x, y) ** 3 + ragged
    field -= np.quantile(field[::16, ::16], 1 - rng.uniform(0.5, 0.66))
    glass_margin = np.minimum(1 - np.abs(x), 1 - np.abs(y)) * 12 - 0.6 + 3 * ragged
    return np.clip(np.minimum(field, glass_margin) / 0.04, 0, 1)


def place_discs(
    rng: np.random.Generator, tissue: Array, taken: list[tuple[float, float, float]], count: int, low: float, high: float, gap: float
) -> list[tuple[float, float, float]]:
    """Up to `count` discs (x, y, radius), radius in low..high, inside the tissue and `gap` px away from those `taken`."""
    depth = cv2.distanceTransform((tissue[::8, ::8] > 0.5).astype(np.uint8), cv2.DIST_L2, 5) * 8
    height, width = tissue.shape
    placed: list[tuple[float, float, float]] = []
    for _ in range(40 * count):
        x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(low, high)
        if depth[int(y) // 8, int(x) // 8] < radius + 15:
            continue
        if all((x - a) ** 2 + (y - b) ** 2 > (radius + c + gap) ** 2 for a, b, c in taken):
            placed.append((x, y, radius))
            taken.append(placed[-1])
            if len(placed) == count:
                break
    return placed


def fibre_direction(rng: np.random.Generator, height: int, width: int) -> Array:
    """Angle of the collagen fibres in radians, float32 (height, width): a slow swirl with a wave in it."""
    return 1.6 * smooth_noise(rng, height, width, 220) + 0.35 * smooth_noise(rng, height, width, 22)


def stroma(rng: np.random.Generator, direction: Array, tissue: Array) -> tuple[Array, Array]:
    """Eosin and haematoxylin of the fibrous ground: noise smeared along the fibres, with clefts between bundles."""
    height, width = (v // 2 for v in direction.shape)
    angle = cv2.resize(direction, (width, height))
    noise = smooth_noise(rng, height, width, 0.9)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    dx, dy = np.cos(angle), np.sin(angle)
    fibres = np.zeros_like(noise)
    for step in range(-14, 15, 2):
        fibres += cv2.remap(noise, x + step * dx, y + step * dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    fibres = cv2.resize(fibres / fibres.std(), direction.shape[::-1], interpolation=cv2.INTER_CUBIC)
    density = smooth_noise(rng, *direction.shape, 70)
    cleft = np.clip((-fibres - 0.9 - 0.5 * density) / 0.6, 0, 1)  # the loose parts of the stroma gape
    eosin = np.clip(0.46 + 0.09 * fibres + 0.06 * density, 0.05, None) * (1 - 0.85 * cleft)
    haematoxylin = np.clip(0.07 + 0.02 * fibres, 0, None) * (1 - 0.85 * cleft)
    return eosin.astype(np.float32), haematoxylin.astype(np.float32)


def draw_nuclei(rng: np.random.Generator, layer: Array, centres: Array, axes: Array, angles: Array, depth: Array, ragged: float) -> None:
    """Draw n nuclei into `layer` (uint8, NUCLEUS_UNIT grey levels a unit of haematoxylin), each with a darker membrane.

    centres (n, 2) and half axes (n, 2) in pixels, angles (n,) in radians, depth (n,) in units of haematoxylin; `ragged`
    is the relative size of the dents in the outline.
    """
    count = len(centres)
    turn = np.linspace(0, 2 * np.pi, 16, endpoint=False)[None]
    phase = rng.uniform(0, 2 * np.pi, (2, count, 1))
    dents = 1 + ragged * (np.cos(2 * turn + phase[0]) + np.cos(3 * turn + phase[1]))
    u, v = axes[:, :1] * dents * np.cos(turn), axes[:, 1:] * dents * np.sin(turn)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    outlines = np.stack([centres[:, :1] + u * cos - v * sin, centres[:, 1:] + u * sin + v * cos], -1)
    for outline, value in zip(np.rint(outlines * 8).astype(np.int32), depth * NUCLEUS_UNIT, strict=True):
        cv2.fillPoly(layer, [outline], float(0.85 * value), cv2.LINE_AA, shift=3)
        cv2.polylines(layer, [outline], True, float(value), 1, cv2.LINE_AA, shift=3)


def scatter(rng: np.random.Generator, height: int, width: int, per_mm2: float) -> Array:
    """Centres (n, 2) as (x, y), strewn evenly, `per_mm2` to the square millimetre."""
    return rng.uniform(0, (width, height), (int(per_mm2 * height * width * (MPP / 1000) ** 2), 2))


def crowd(rng: np.random.Generator, x: float, y: float, radius: float, spacing: float, keep: float) -> Array:
    """Centres (n, 2) packed about `spacing` px apart within a ragged disc."""
    row, column = np.mgrid[-radius : radius : spacing * 0.87, -radius : radius : spacing]
    column[1::2] += spacing / 2
    points = np.stack([column.ravel(), row.ravel()], -1) + rng.normal(0, 0.17 * spacing, (row.size, 2))
    turn, phase = np.arctan2(points[:, 1], points[:, 0]), rng.uniform(0, 2 * np.pi, 2)
    reach = radius * (0.9 + 0.12 * np.cos(2 * turn + phase[0]) + 0.08 * np.cos(5 * turn + phase[1]))
    inside = np.hypot(*points.T) < reach * np.where(rng.random(len(points)) < 0.25, 1.1, 0.95)  # frayed rim
    inside &= rng.random(len(points)) < keep
    return points[inside] + (x, y)


def spindle_nuclei(rng: np.random.Generator, layer: Array, direction: Array, per_mm2: float) -> None:
    """Fibroblasts: thin nuclei that lie along the fibres."""
    centres = scatter(rng, *layer.shape, per_mm2)
    n = len(centres)
    column, row = centres.astype(int).T
    axes = np.stack([rng.uniform(6, 12, n), rng.uniform(1.8, 3.4, n)], -1)
    draw_nuclei(rng, layer, centres, axes, direction[row, column] + rng.normal(0, 0.15, n), rng.uniform(0.7, 1.25, n), 0.05)


def lymphocytes(rng: np.random.Generator, layer: Array, centres: Array) -> None:
    """Small, round, dark nuclei with hardly any cytoplasm."""
    n = len(centres)
    axes = rng.uniform(4.2, 5.4, (n, 1)) * rng.uniform(0.9, 1.1, (n, 2))
    draw_nuclei(rng, layer, centres, axes, rng.uniform(0, np.pi, n), rng.uniform(1.1, 1.5, n), 0.03)


def paint_gland(rng: np.random.Generator, gland: tuple[float, float, float], eosin: Array, haematoxylin: Array, nuclei: Array) -> None:
    """A gland cut across: basement membrane, columnar cells with basal nuclei and mucus, and a lumen."""
    x, y, radius = gland
    turn = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    phase, stretch, tilt = rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.55, 1), rng.uniform(0, np.pi)
    wall = radius * (0.87 + 0.07 * np.cos(2 * turn + phase[0]) + 0.06 * np.cos(3 * turn + phase[1]))
    ring = np.stack([wall * np.cos(turn), stretch * wall * np.sin(turn)], -1)
    ring = ring @ np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    inner = np.hypot(*ring.T)[:, None]
    outward = ring / inner
    cell_height = rng.uniform(34, 44)
    lumen = outward * np.maximum(inner - cell_height * (1 + 0.1 * np.cos(7 * turn + phase[2]))[:, None], 5)

    box = np.s_[int(y - radius) - 6 : int(y + radius) + 7, int(x - radius) - 6 : int(x + radius) + 7]
    centre = np.array([x - box[1].start, y - box[0].start])

    def filled(outline: Array, soften: float) -> Array:
        mask = np.zeros(eosin[box].shape, np.uint8)
        cv2.fillPoly(mask, [np.rint((outline + centre) * 8).astype(np.int32)], 255, cv2.LINE_AA, shift=3)
        return cv2.GaussianBlur(mask.astype(np.float32) / 255, (0, 0), soften)

    membrane, body, hollow = filled(ring * 1.05, 1.5), filled(ring, 1), filled(lumen, 1.2)
    speckle = smooth_noise(rng, *body.shape, 3)
    for layer, stroma_share, cytoplasm, content in (
        (eosin, 0.52, 0.34 + 0.05 * speckle, rng.choice([0.02, 0.02, 0.16])),
        (haematoxylin, 0.08, 0.17 + 0.03 * speckle, 0.02),
    ):
        layer[box] += membrane * (stroma_share - layer[box]) * 0.8
        layer[box] += body * (cytoplasm - layer[box])
        layer[box] += hollow * (content + 0.02 * speckle - layer[box])

    cells = int(np.hypot(*np.diff(ring, axis=0, append=ring[:1]).T).sum() / rng.uniform(9.5, 11.5))
    at = (np.linspace(0, 120, cells, endpoint=False) + rng.normal(0, 0.25, cells)).astype(int) % 120
    depth_in_cell = rng.uniform(9, 15, cells)[:, None]
    # Goblets of mucus hang in the inner half of some cells.
    for k in np.flatnonzero(rng.random(cells) < rng.uniform(0.1, 0.5)):
        goblet = ring[at[k]] - outward[at[k]] * rng.uniform(22, 27) + centre
        blob = np.zeros(body.shape, np.float32)
        cv2.circle(blob, tuple(int(v) for v in np.rint(goblet)), int(rng.integers(4, 7)), 1.0, -1)
        blob = cv2.GaussianBlur(blob, (0, 0), 1.2)
        eosin[box] *= 1 - 0.7 * blob
        haematoxylin[box] *= 1 - 0.45 * blob
    nuclei[box][body > 0.3] = 0  # nothing of the stroma lies in the gland
    axes = np.stack([rng.uniform(6.2, 9, cells), rng.uniform(3.6, 4.8, cells)], -1)
    angles = np.arctan2(*outward[at].T[::-1]) + rng.normal(0, 0.12, cells)
    draw_nuclei(rng, nuclei, (x, y) + ring[at] - outward[at] * depth_in_cell, axes, angles, rng.uniform(0.8, 1.2, cells), 0.04)


def paint_focus(rng: np.random.Generator, focus: tuple[float, float, float], eosin: Array, haematoxylin: Array, nuclei: Array) -> None:
    """A focus of tumour: crowded, large, dark nuclei of every shape in a purple ground, no gland."""
    x, y, radius = focus
    centres = crowd(rng, x, y, radius, spacing=16.5, keep=0.96)
    ground = np.zeros(eosin.shape, np.uint8)
    for centre in np.rint(centres).astype(int):
        cv2.circle(ground, tuple(int(v) for v in centre), 14, 255, -1)
    box = np.s_[max(int(y - radius) - 30, 0) : int(y + radius) + 31, max(int(x - radius) - 30, 0) : int(x + radius) + 31]
    body = cv2.GaussianBlur(ground[box].astype(np.float32) / 255, (0, 0), 3)
    speckle = smooth_noise(rng, *body.shape, 3)
    eosin[box] += body * (0.4 + 0.06 * speckle - eosin[box])
    haematoxylin[box] += body * (0.4 + 0.05 * speckle - haematoxylin[box])
    nuclei[box][body > 0.4] = 0
    n = len(centres)
    axes = rng.uniform(6.5, 11.5, (n, 1)) * np.stack([np.ones(n), rng.uniform(0.6, 1, n)], -1)
    depth = rng.uniform(1.3, 2.1, n)
    draw_nuclei(rng, nuclei, centres, axes, rng.uniform(0, np.pi, n), depth, 0.09)
    nucleoli = rng.random(n) < 0.4
    draw_nuclei(rng, nuclei, centres[nucleoli] + rng.normal(0, 2, (nucleoli.sum(), 2)), np.full((nucleoli.sum(), 2), 1.8), np.zeros(nucleoli.sum()), depth[nucleoli] + 0.4, 0)


def expose(rng: np.random.Generator, stain: Stain, haematoxylin: Array, eosin: Array, pen: bool) -> Array:
    """Light through the stains (and the felt-tip ring on the cover glass), with the scanner's noise: RGB uint8."""
    height, width = eosin.shape
    density = haematoxylin[..., None] * stain.haematoxylin + eosin[..., None] * stain.eosin
    if pen:
        ring = np.zeros((height, width), np.uint8)
        centre = (int(width * rng.uniform(0.35, 0.65)), int(height * rng.uniform(0.35, 0.65)))
        cv2.ellipse(ring, centre, (width // 5, height // 6), 20, 25, 370, 255, 46, cv2.LINE_AA)
        ink = cv2.GaussianBlur(ring.astype(np.float32) / 255, (0, 0), 4) * (1 + 0.12 * smooth_noise(rng, height, width, 40))
        density += ink[..., None] * np.array([1.9, 0.95, 0.25], np.float32)
    pixels = np.exp(-density, out=density) * (LIGHT * rng.uniform(0.985, 1.01))
    pixels += 1.6 * rng.standard_normal((height, width, 1), np.float32)
    return np.clip(pixels, 0, 255).astype(np.uint8)


# ---- files ----------------------------------------------------------------------------------------------------------


def write_aperio(path: Path, pixels: Array, slide_id: str, mpp: float | None) -> None:
    """Write RGB `pixels` as OpenSlide expects a slide of Aperio's: level 0 and level 1 (a quarter) in 256 px JPEG tiles,
    a thumbnail in strips between them, and a description that begins with "Aperio"."""
    height, width = pixels.shape[:2]
    about = f"AppMag = {OBJECTIVE_POWER}|ScanScope ID = gmmamba demo|Filename = {slide_id}"
    about += f"|MPP = {mpp}" if mpp else ""
    quarter = cv2.resize(pixels, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    thumbnail = cv2.resize(pixels, (width // 8, height // 8), interpolation=cv2.INTER_AREA)
    title = "Aperio Image Library, drawn by gmmamba\r\n"
    with tifffile.TiffWriter(path) as tiff:
        for image, tile, description in (
            (pixels, (256, 256), f"{title}{width}x{height} (256x256) JPEG/RGB Q=85|{about}"),
            (thumbnail, None, f"{title}{width}x{height} -> {width // 8}x{height // 8}|{about}"),
            (quarter, (256, 256), f"{title}{width}x{height} -> {width // 4}x{height // 4} JPEG/RGB Q=85|{about}"),
        ):
            tiff.write(
                image,
                photometric="rgb",
                tile=tile,
                compression="jpeg",
                compressionargs={"level": 85},
                description=description,
                metadata=None,
                software=False,
                rowsperstrip=None if tile else 16,
            )


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write rows under a header, whole or not at all."""
    with replace_when_whole(path) as part, part.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
