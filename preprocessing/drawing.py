"""The pictures that `tile` writes: the slide with what was found on it, or a reason in words."""

import textwrap

import cv2
import numpy as np

THUMBNAIL_PX = 1024  # long side
TISSUE, HOLE, INK = (0, 160, 0), (0, 90, 255), (230, 120, 0)


def draw_mask(
    thumbnail: np.ndarray,
    tissue: np.ndarray,
    ink: np.ndarray,
    coords: np.ndarray,
    slide_size: tuple[int, int],
    patch_px_level0: float,
) -> np.ndarray:
    """The thumbnail with outlines of the kept patches (black), tissue (green), its holes (blue) and ink (orange).

    tissue, ink: (H, W) bool over the whole slide; coords: (N, 2), and patch_px_level0, in level-0 pixels.
    """
    picture = thumbnail.copy()
    size = (picture.shape[1], picture.shape[0])
    scale = np.array(size) / np.array(slide_size)
    first, last = (np.rint((coords + side) * scale).astype(np.int32) for side in (0, patch_px_level0))
    corners = np.hstack([first, last])  # left, top, right, bottom
    squares = corners[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    cv2.polylines(picture, list(squares), True, (0, 0, 0), 1)
    picture = cv2.addWeighted(thumbnail, 0.5, picture, 0.5, 0)
    for mask, colour, hole_colour in ((tissue, TISSUE, HOLE), (ink, INK, INK)):
        enlarged = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        contours, hierarchy = cv2.findContours(enlarged, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        for i in range(len(contours)):
            is_hole = hierarchy[0][i][3] >= 0
            cv2.drawContours(picture, contours, i, hole_colour if is_hole else colour, 2)
    return picture


def draw_reason(reason: str) -> np.ndarray:
    """A picture in place of a thumbnail that could not be made: the reason in words."""
    picture = np.full((THUMBNAIL_PX // 2, THUMBNAIL_PX, 3), 255, np.uint8)
    text = reason.replace("µ", "u").replace("²", "2")  # OpenCV's letters are ASCII
    for i, line in enumerate(textwrap.wrap(text, 64)):
        cv2.putText(picture, line, (24, 56 + 34 * i), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (160, 0, 0), 1, cv2.LINE_AA)
    return picture


def encode_picture(extension: str, picture: np.ndarray) -> bytes:
    """An (H, W, 3) uint8 RGB picture as the bytes of a .jpg or .png file."""
    encoded = cv2.imencode(extension, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1]
    return bytes(encoded.tobytes())
