"""The grid of patches over a slide, and how much of each patch a mask covers."""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Grid:
    """Patches that lie fully inside the slide: all combinations of the left edges `xs` (X,) and upper edges `ys` (Y,).

    side: of a patch; slide_size: (width, height); all in whole level-0 pixels. outside: how many patches more begin in
    the slide, but reach over its right or lower edge.
    """

    xs: np.ndarray
    ys: np.ndarray
    side: int
    slide_size: tuple[int, int]
    outside: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.ys), len(self.xs)

    def coords(self, chosen: np.ndarray) -> np.ndarray:
        """(N, 2) int32 corners (x, y) of the `chosen` (Y, X) bool patches, in row-major order."""
        row, column = np.nonzero(chosen)
        return np.stack([self.xs[column], self.ys[row]], axis=1).astype(np.int32)

    def shares(self, mask: np.ndarray) -> np.ndarray:
        """(Y, X) float: the share of each patch that the mask, (H, W) bool over the whole slide, covers."""
        if not mask.any():
            return np.zeros(self.shape)
        # The integral picture, read between its pixels by linear interpolation, gives the exact area.
        integral = cv2.integral(mask.astype(np.uint8), sdepth=cv2.CV_64F)
        width, height = self.slide_size
        columns = [_between(integral, x * mask.shape[1] / width, axis=1) for x in (self.xs, self.xs + self.side)]
        band = columns[1] - columns[0]
        rows = [_between(band, y * mask.shape[0] / height, axis=0) for y in (self.ys, self.ys + self.side)]
        return np.asarray((rows[1] - rows[0]) / (self.side**2 * mask.size / (width * height)))


def lay_grid(slide_size: tuple[int, int], patch_px_level0: float, step_px_level0: float) -> Grid:
    """Patches of `patch_px_level0` every `step_px_level0` from the slide's upper left corner, level-0 pixels.

    Patch i of a row starts at round(i * step), so that rounding does not add up over the row.
    """
    side = round(patch_px_level0)
    starts, begun = [], 1
    for length in slide_size:
        corners = np.rint(np.arange(int(length / step_px_level0) + 1) * step_px_level0).astype(np.int64)
        starts.append(corners[corners + side <= length])
        begun *= int(np.ceil(length / step_px_level0))
    xs, ys = starts
    return Grid(xs, ys, side, slide_size, begun - len(xs) * len(ys))


def whole_grid(slide_size: tuple[int, int], patch_px_level0: float) -> np.ndarray:
    """(N, 2) int32 corners of all patches of a slide, side by side, wherever there is tissue."""
    grid = lay_grid(slide_size, patch_px_level0, patch_px_level0)
    return grid.coords(np.ones(grid.shape, bool))


def _between(values: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """`values` at fractional `positions` along `axis`, by linear interpolation."""
    positions = np.minimum(positions, values.shape[axis] - 1)
    below = np.minimum(positions.astype(np.int64), values.shape[axis] - 2)
    share = np.expand_dims(positions - below, 1 - axis)
    return np.take(values, below, axis) * (1 - share) + np.take(values, below + 1, axis) * share
