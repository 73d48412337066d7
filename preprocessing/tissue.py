"""Find tissue on a low-resolution picture of a slide.

Tissue is coloured, glass is not: saturation (HSV) after white balance on the slide's own background, median blur, a
threshold (fixed, or Otsu's within plausible bounds), closing, removal of specks and small holes by their area in µm².
"""

from dataclasses import dataclass

import cv2
import numpy as np

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
    """mask (H, W) bool; saturation threshold used (0-255); colour of the glass (R, G, B); warnings in
    words."""

    mask: np.ndarray
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
    balanced = np.minimum(image * (255 / np.maximum(background, 1.0)), 255).astype(np.uint8)
    hsv = np.asarray(cv2.cvtColor(balanced, cv2.COLOR_RGB2HSV))
    saturation = np.where(hsv[..., 2] < BLACK_VALUE, 0, hsv[..., 1]).astype(np.uint8)
    if np.ptp(background) / background.max() * 255 > MAX_GLASS_SATURATION:
        colour = ", ".join(str(round(float(c))) for c in background)
        warnings.append(f"implausible colours: the background is RGB ({colour}), not white; check the slide's decoding")
    else:
        saturation[pen_marks(hsv)] = 0
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
    return Tissue(mask.astype(bool), threshold, (red, green, blue), warnings)


def estimate_background(image: np.ndarray) -> np.ndarray:
    """(3,) float RGB: median colour of the bright, flat pixels of (H, W, 3) uint8; white where there are
    few."""
    kernel = np.ones((3, 3), np.uint8)
    spread = (cv2.dilate(image, kernel) - cv2.erode(image, kernel)).max(axis=2)
    glass = image[(spread <= FLAT_RANGE) & (image.max(axis=2) >= GLASS_VALUE)]
    if len(glass) < MIN_GLASS_SHARE * image.shape[0] * image.shape[1]:
        return np.full(3, 255.0)
    return np.median(glass, axis=0)


def pen_marks(hsv: np.ndarray) -> np.ndarray:
    """(H, W) bool: ink of green, blue and red pens in an OpenCV HSV picture (hue 0-179); black ink is
    colourless.

    No stain is green; stains come as blue and red too, but not as strong as ink.
    """
    hue, saturation = hsv[..., 0], hsv[..., 1]
    green = (hue > 35) & (hue < 95) & (saturation > 40)
    blue = (hue >= 95) & (hue < 122) & (saturation > 150)
    red = ((hue < 6) | (hue > 176)) & (saturation > 180)
    return green | blue | red


def without_small_parts(mask: np.ndarray, min_pixels: float) -> np.ndarray:
    """The (H, W) uint8 0/1 mask without 8-connected parts of fewer than `min_pixels` pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_pixels
    keep[0] = False
    return keep[labels].astype(np.uint8)


def odd(pixels: float) -> int:
    """The nearest odd number of pixels, at least 1: kernels have a centre."""
    return 2 * int(pixels / 2) + 1
