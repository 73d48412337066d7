"""What spoils tissue: ink of pens, folds, blur, and patches that are nearly all glass or black.

Ink and folds are found on the small picture that the tissue mask is made on. The rest is measured on the pixels of the
patches themselves, at the patches' own scale; that reads the slide once more, so it is done only where a threshold asks
for it.
"""

from dataclasses import dataclass

import cv2
import numpy as np

INK_UM2 = 5_000.0  # smaller spots of an ink's colour are nuclei or dust
INK_MARGIN_UM = 8.0  # the edge of a stroke, where its colour mixes with what is beside it
BLACK_INK_VALUE = 100  # black ink is no brighter (HSV value) ...
BLACK_INK_CHROMA = 30  # ... and has no colour (largest minus smallest of R, G, B), unlike nuclei and folds
BLACK_INK_DARKEST = 11  # darker is no ink: scanners put black in the place of pixels that they have not
FOLD_BLUR_UM = 60.0  # at least as wide as crowded nuclei, which are as dense as folds
FOLD_UM2 = 20_000.0
WHITE_VALUE = 220  # R, G and B of a nearly white pixel, white-balanced
BLACK_VALUE = 50  # none of R, G and B of a nearly black pixel is above


@dataclass(frozen=True)
class PixelLimits:
    """Thresholds on the patches' own pixels, those of the tiling settings; the defaults accept every patch."""

    max_white_share: float = 1.0
    max_black_share: float = 1.0
    min_sharpness: float = 0.0

    @property
    def accept_all(self) -> bool:
        return self == PixelLimits()


def pen_marks(hsv: np.ndarray) -> np.ndarray:
    """(H, W) bool: colours of green, blue, red and black ink in an OpenCV HSV picture (hue 0-179).

    No stain is green; stains come as blue and red too, but not as strong as ink, and as dark, but not without colour.
    """

    def within(low: tuple[int, int, int], high: tuple[int, int, int]) -> np.ndarray:
        return np.asarray(cv2.inRange(hsv, np.array(low), np.array(high))).view(bool)

    green = within((36, 41, 0), (94, 255, 255))
    blue = within((95, 151, 0), (121, 255, 255))
    red = within((0, 181, 0), (5, 255, 255)) | within((177, 181, 0), (179, 255, 255))
    chroma = np.asarray(cv2.multiply(hsv[..., 1], hsv[..., 2], scale=1 / 255))
    dark = within((0, 0, BLACK_INK_DARKEST), (179, 255, BLACK_INK_VALUE))
    return green | blue | red | (dark & (chroma <= BLACK_INK_CHROMA))


def strokes(marks: np.ndarray, mpp: float) -> np.ndarray:
    """Those of the (H, W) bool `marks` that are large enough for a pen, with their edges; mpp in µm per pixel."""
    if not marks.any():
        return marks
    ink = without_small_parts(marks.astype(np.uint8), INK_UM2 / mpp**2)
    margin = 2 * int(np.ceil(INK_MARGIN_UM / mpp)) + 1
    return np.asarray(cv2.dilate(ink, np.ones((margin, margin), np.uint8))).astype(bool)


def find_folds(balanced: np.ndarray, tissue: np.ndarray, mpp: float, density_ratio: float) -> np.ndarray:
    """(H, W) bool: where tissue lies double: `density_ratio` times as dense as the median of the slide's tissue.

    Density is optical, the mean of R, G and B. balanced: (H, W, 3) uint8 RGB, white-balanced; tissue: (H, W) bool
    without ink; mpp: of both, µm per pixel.
    """
    if not tissue.any():
        return np.zeros(tissue.shape, bool)
    density = -np.log((balanced.astype(np.float32) + 1) / 256).mean(axis=2)
    wide = 2 * int(FOLD_BLUR_UM / mpp / 2) + 1
    density = np.asarray(cv2.blur(density, (wide, wide)))
    folds = tissue & (density > density_ratio * np.median(density[tissue]))
    return without_small_parts(folds.astype(np.uint8), FOLD_UM2 / mpp**2).astype(bool)


def pixel_flaws(patches: np.ndarray, background: tuple[int, int, int], limits: PixelLimits) -> np.ndarray:
    """(B,) str: the first limit that each of (B, P, P, 3) uint8 RGB patches breaks: "white", "black", "blurred", or "".

    background: colour of the slide's glass (R, G, B). White and black are shares of a patch's pixels. Sharpness is the
    variance of the Laplacian of the grey patch (0-255): below about 15 at 0.5 µm/px a patch is out of focus.
    """
    white_from = WHITE_VALUE / 255 * np.array(background)
    flaws = np.full(len(patches), "", "U8")
    for i, patch in enumerate(patches):
        if (patch >= white_from).all(axis=2).mean() > limits.max_white_share:
            flaws[i] = "white"
        elif (patch.max(axis=2) <= BLACK_VALUE).mean() > limits.max_black_share:
            flaws[i] = "black"
        elif limits.min_sharpness and sharpness(patch) < limits.min_sharpness:
            flaws[i] = "blurred"
    return flaws


def sharpness(patch: np.ndarray) -> float:
    """Variance of the Laplacian of a (P, P, 3) uint8 RGB patch in grey (0-255)."""
    return float(cv2.Laplacian(cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY), cv2.CV_32F).var())


def without_small_parts(mask: np.ndarray, min_pixels: float) -> np.ndarray:
    """The (H, W) uint8 0/1 mask without 8-connected parts of fewer than `min_pixels` pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_pixels
    if keep.all():
        return mask
    keep[0] = False
    return keep[labels].astype(np.uint8)
