"""What OpenSlide gives for a region that begins between two pixels of its level, to the last bit.

OpenSlide paints each tile at its fractional place with cairo: bilinear, transparent beyond the tile's edge, the tiles
added up by the operator SATURATE. Pixman does this in float32 with fractions of 1/65536 and stores 8 bits after every
tile, from the last tile to the first. The region then goes through openslide-python (alpha divided out) and onto white.
Compiled by numba, because a patch has a hundred thousand pixels; it releases the GIL.
"""

from typing import Any

import numba
import numpy as np

ONE, ZERO, INVERSE = np.float32(1), np.float32(0), np.float32(1) / np.float32(255)


@numba.njit(nogil=True, cache=True)
def stored(value: Any) -> int:
    """A float32 of 0 to 1 as Pixman stores it in 8 bits."""
    whole = int(min(value, ONE) * np.float32(256))
    return whole - (whole >> 8)


@numba.njit(nogil=True, cache=True)
def paint_between(
    source: np.ndarray, width: int, height: int, dx: Any, dy: Any, new_column: np.ndarray, new_row: np.ndarray
) -> np.ndarray:
    """The region (h, w, 3) uint8 that begins `dx`, `dy` (float32, below 1) after the first pixel of `source`.

    source: (h + 1, w + 1, 3) uint8, of which `width` x `height` pixels lie in the level. new_column (w + 1,), new_row
    (h + 1,): whether a tile begins there.
    """
    h, w = source.shape[0] - 1, source.shape[1] - 1
    out = np.empty((h, w, 3), np.uint8)
    weights = np.empty((2, 2), np.float32)
    weights[0, 0], weights[0, 1] = (ONE - dx) * (ONE - dy), dx * (ONE - dy)
    weights[1, 0], weights[1, 1] = (ONE - dx) * dy, dx * dy
    painted = np.empty(4, np.int64)
    for i in range(h):
        for j in range(w):
            seam_x, seam_y = new_column[j + 1], new_row[i + 1]
            if not seam_x and not seam_y and i + 1 < height and j + 1 < width:
                for c in range(3):
                    out[i, j, c] = stored(
                        np.float32(source[i, j, c]) * INVERSE * weights[0, 0]
                        + np.float32(source[i, j + 1, c]) * INVERSE * weights[0, 1]
                        + np.float32(source[i + 1, j, c]) * INVERSE * weights[1, 0]
                        + np.float32(source[i + 1, j + 1, c]) * INVERSE * weights[1, 1]
                    )
                continue
            painted[:] = 0
            # The tiles under the four pixels, from the last to the first; without a seam the first has all.
            for tile_y in range(1 if seam_y else 0, -1, -1):
                for tile_x in range(1 if seam_x else 0, -1, -1):
                    alpha = ZERO
                    colour = np.zeros(3, np.float32)
                    for y in range(2):
                        for x in range(2):
                            of_tile = (not seam_y or y == tile_y) and (not seam_x or x == tile_x)
                            if of_tile and i + y < height and j + x < width:
                                alpha += weights[y, x]
                                for c in range(3):
                                    colour[c] += np.float32(source[i + y, j + x, c]) * INVERSE * weights[y, x]
                    before = np.float32(painted[3]) * INVERSE
                    share = ONE if alpha == ZERO else max(ZERO, min(ONE, (ONE - before) / alpha))
                    for c in range(3):
                        painted[c] = stored(colour[c] * share + np.float32(painted[c]) * INVERSE)
                    painted[3] = stored(alpha * share + before)
            opaque = np.float32(painted[3]) / np.float32(255)
            for c in range(3):
                plain = 255 * painted[c] // painted[3] if 0 < painted[3] < 255 else painted[c]
                out[i, j, c] = np.uint8(np.rint(np.float32(plain) * opaque + np.float32(255) * (ONE - opaque)))
    return out
