"""The pixels of patches, read ahead of whoever uses them. Never imports torch.

Each patch is read at the coarsest level that is at least as fine as the target mpp and brought to exactly patch_px
by area averaging. Reader threads run ahead; the order of patches does not depend on them.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from preprocessing.slide import Slide, resize


def read_batches(
    slide: Slide, coords: np.ndarray, patch_px: int, mpp: float, batch_size: int, readers: int
) -> Iterator[np.ndarray]:
    """(B, P, P, 3) uint8 RGB patches, batch after batch in the order of `coords`, P = patch_px.

    coords: (N, 2), level-0 pixels; mpp: µm per pixel of the patches.

    `readers` threads work ahead, one batch each; at most readers + 1 batches are held.
    """
    level = slide.best_level(mpp)
    # A patch is a whole number of pixels of the level: the error, below half such a pixel, does not add up.
    side = max(1, round(patch_px * mpp / slide.level0_mpp / slide.handle.level_downsamples[level]))

    def read(corners: np.ndarray) -> np.ndarray:
        patches = np.empty((len(corners), patch_px, patch_px, 3), np.uint8)
        for i, (x, y) in enumerate(corners):
            patches[i] = resize(slide.read_region(x, y, level, side, side), (patch_px, patch_px))
        return patches

    with ThreadPoolExecutor(readers) as pool:
        ahead: deque[Future[np.ndarray]] = deque()
        try:
            for first in range(0, len(coords), batch_size):
                ahead.append(pool.submit(read, coords[first : first + batch_size]))
                if len(ahead) > readers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
