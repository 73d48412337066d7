"""Find tissue on a low-resolution picture of a slide.

Tissue is coloured, glass is not: saturation (HSV) after white balance on the slide's own background, median blur, a
threshold (fixed, or Otsu's within plausible bounds), closing, removal of specks and small holes by their area in µm².
Ink of pens is cut out last: closing would fill a stroke on tissue.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from preprocessing.quality import pen_marks, strokes, without_small_parts

# Saturation (0-255) between which Otsu's threshold is trusted. On a nearly empty slide it would split the
# noise of the glass, on a slide full of tissue it would split pale from dark tissue.
OTSU_RANGE = (8.0, 30.0)
FLAT_RANGE = 4  # grey levels within 3 x 3 px up to which a bright pixel is taken for glass
GLASS_VALUE = 180  # glass is at least this bright (HSV value)
MIN_GLASS_SHARE = 0.02  # of the slide, below which its background colour is not estimated but taken as white
MAX_GLASS_SATURATION = 60  # a background more colourful than this is no glass: the colours are wrong
BLACK_VALUE = 50  # pixels darker than this are black fill, ink or shadow; their saturation is noise


@dataclass(frozen=True)
class Tissue:
    """mask and ink, (H, W) bool and never both; the white-balanced picture (H, W, 3) uint8 RGB; saturation threshold
    used (0-255); colour of the glass (R, G, B); warnings in words."""

    mask: np.ndarray
    ink: np.ndarray
    balanced: np.ndarray
    threshold: float
    background: tuple[int, int, int]
    warnings: list[str]


def find_tissue(
    image: np.ndarray,
    mpp: float,
    saturation_threshold: float | str,
    median_blur_um: float,
    closing_um: float,
    min_tissue_um2: float,
    min_hole_um2: float,
) -> Tissue:
    """Tissue mask of `image`, (H, W, 3) uint8 RGB at `mpp` µm per pixel; see the module for the steps.

    `saturation_threshold` is "otsu" or a number from 0 to 255.
    """
    warnings = []
    background = estimate_background(image)
    # White-balanced, so that tinted glass does not count as tissue, nor tissue on it as glass.
    grey_levels = np.arange(256)[:, None] * (255 / np.maximum(background, 1.0))
    balanced = np.asarray(cv2.LUT(image, np.minimum(grey_levels, 255).astype(np.uint8)[None]))
    hsv = np.asarray(cv2.cvtColor(balanced, cv2.COLOR_RGB2HSV))
    saturation = hsv[..., 1].copy()
    saturation[hsv[..., 2] < BLACK_VALUE] = 0
    if np.ptp(background) / background.max() * 255 > MAX_GLASS_SATURATION:
        colour = ", ".join(str(round(float(c))) for c in background)
        warnings.append(f"implausible colours: the background is RGB ({colour}), not white; check the slide's decoding")
        ink = np.zeros(saturation.shape, bool)
    else:
        marks = pen_marks(hsv)
        saturation[marks] = 0
        ink = strokes(marks, mpp)
    saturation = np.asarray(cv2.medianBlur(saturation, odd(median_blur_um / mpp)), np.uint8)
    if saturation_threshold == "otsu":
        otsu, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
        threshold = float(np.clip(otsu, *OTSU_RANGE))
    else:
        threshold = float(saturation_threshold)

    mask = (saturation > threshold).astype(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (odd(closing_um / mpp),) * 2)
    mask = np.asarray(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel), np.uint8)
    mask = without_small_parts(mask, min_tissue_um2 / mpp**2)
    mask = 1 - without_small_parts(1 - mask, min_hole_um2 / mpp**2)
    red, green, blue = (round(float(c)) for c in background)
    return Tissue(mask.astype(bool) & ~ink, ink, balanced, threshold, (red, green, blue), warnings)


def estimate_background(image: np.ndarray) -> np.ndarray:
    """(3,) float RGB: median colour of the bright, flat pixels of (H, W, 3) uint8; white where there are
    few."""
    kernel = np.ones((3, 3), np.uint8)
    spread = largest(cv2.subtract(cv2.dilate(image, kernel), cv2.erode(image, kernel)))
    glass = ((spread <= FLAT_RANGE) & (largest(image) >= GLASS_VALUE)).astype(np.uint8)
    n_pixels = int(glass.sum())
    if n_pixels < MIN_GLASS_SHARE * glass.size:
        return np.full(3, 255.0)
    seen = [np.cumsum(cv2.calcHist([image], [channel], glass, [256], [0, 256])) for channel in range(3)]
    middle = ((n_pixels - 1) // 2 + 1, n_pixels // 2 + 1)  # one pixel of an odd number, else two, counted from 1
    return np.array([np.searchsorted(counts, middle).mean() for counts in seen])


def largest(image: np.ndarray) -> np.ndarray:
    """(H, W) uint8: the largest of R, G and B."""
    red, green, blue = cv2.split(image)
    return np.asarray(cv2.max(cv2.max(red, green), blue))


def odd(pixels: float) -> int:
    """The nearest odd number of pixels, at least 1: kernels have a centre."""
    return 2 * int(pixels / 2) + 1
