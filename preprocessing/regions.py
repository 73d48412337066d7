"""Square regions of a level, put together from its tiles; each tile is decoded once.

A reader thread takes a batch of regions at a time. Python sees a batch's tiles, not its patches: the pixels are pasted
by compiled code without the GIL, which threads would otherwise wait for.
"""

import threading

import cv2
import numba
import numpy as np

from preprocessing.between_pixels import paint_between
from preprocessing.jpeg_tiles import DamagedTileError, JpegTiles, MissingTileError
from preprocessing.slide import resize

CACHE_BYTES = 256 * 1024**2
FRACTIONS = 65536  # Pixman's places are multiples of 1/65536 of a pixel

Errors = dict[int, DamagedTileError | MissingTileError]


class PlannedRegions:
    """The regions to read of a level; threads share its decoded tiles.

    A tile is kept until the last region that needs it has been read. All lie in one block of CACHE_BYTES; where that is
    full, the uppermost one that nobody is reading goes early, to be decoded again.
    """

    def __init__(
        self, tiles: JpegTiles, corners: np.ndarray, side: int, scale: int = 1, patch_px: int | None = None
    ) -> None:
        """corners: (N, 2) float64, (x, y) in pixels of the level, not negative; side: of a region, in such pixels.

        With scale 1 the regions are OpenSlide's, bit for bit. With 2, 4 or 8 (which must divide the tile's sides) they
        come that much smaller, averaged by the inverse DCT, at the nearest whole pixel.

        patch_px: what the regions are resized to; by default they are left as they are. Where each pixel of a patch is
        the mean of a square of pixels of one tile, the tiles are averaged as soon as they are decoded.
        """
        self.tiles, self.scale, side = tiles, scale, max(1, round(side / scale))
        if scale == 1:
            fixed = np.rint(corners * FRACTIONS).astype(np.int64)  # as Pixman keeps places
            self.first, self.fraction = fixed // FRACTIONS, fixed % FRACTIONS
        else:
            self.first = np.rint(corners / scale).astype(np.int64)
            self.fraction = np.zeros_like(self.first)
        size = np.array([-(-tiles.width // scale), -(-tiles.height // scale)])
        tile_size = np.array([tiles.tile_width, tiles.tile_height]) // scale
        self.patch_px = side if patch_px is None else patch_px
        self.mean_of = max(1, side // self.patch_px)
        if (
            side % self.patch_px
            or self.fraction.any()
            or ((self.first + side) > size).any()
            or (self.first % self.mean_of).any()
            or (tile_size % self.mean_of).any()
        ):
            self.mean_of = 1
        self.first //= self.mean_of
        self.side = side // self.mean_of
        self.width, self.height = (size // self.mean_of).tolist()
        self.tile_width, self.tile_height = (tile_size // self.mean_of).tolist()

        self.grid = np.array([tiles.columns, tiles.rows])
        first, end = self._tile_ranges(np.arange(len(corners)))
        most = int((end - first).prod(axis=1).max(initial=1))  # that one region needs
        room = max(CACHE_BYTES // (3 * self.tile_width * self.tile_height), most)
        self.room = min(room, tiles.columns * tiles.rows)
        self.most_at_once = max(most, self.room // 2)
        # Of each tile: how many regions to come need it, how many batches in work, where it lies, whether it is there.
        self.uses = self._count_uses(first, end)
        self.users = np.zeros(len(self.uses), np.int32)
        self.slots = np.full(len(self.uses), -1, np.int32)
        self.ready = np.zeros(len(self.uses), bool)
        self.faulty: dict[int, BaseException] = {}
        self.free = list(range(self.room))
        self.decoded = np.empty((self.room, self.tile_height, self.tile_width, 3), np.uint8)
        self._changed = threading.Condition()

    def read(self, indices: np.ndarray, out: np.ndarray) -> Errors:
        """Into `out`, (B, P, P, 3) uint8 RGB, P = patch_px: these regions, white outside the level. Each is read once.

        Returns what is wrong with those that cannot be read, by their place in `indices`.
        """
        first, end = self._tile_ranges(indices)
        needed, counts = self._needed(first, end)
        if len(needed) > self.most_at_once and len(indices) > 1:
            half = len(indices) // 2
            rest = self.read(indices[half:], out[half:])
            return self.read(indices[:half], out[:half]) | {half + i: error for i, error in rest.items()}
        mine = self._claim(needed)
        try:
            self._decode(mine)
            with self._changed:
                self._changed.wait_for(lambda: self.ready[needed].all())
            errors = self._errors(needed, first, end)
            self._paste(indices, out, errors)
        finally:
            self._release(needed, counts)
        return errors

    def _tile_ranges(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, 2) each, (column, row): of the first tile of each region, and of the one after the last."""
        tile_size = np.array([self.tile_width, self.tile_height])
        first = self.first[indices]
        # Between two pixels, one more is needed.
        last = first + self.side - 1 + self.fraction[indices].any(axis=1, keepdims=True)
        return np.minimum(first // tile_size, self.grid), np.minimum(last // tile_size + 1, self.grid)

    def _needed(self, first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tiles (row * columns + column) of regions, in the order of the file, and how many regions need each."""
        across, down = (end - first).max(axis=0).tolist()
        columns, rows = first[:, :1] + np.arange(across), first[:, 1:] + np.arange(down)
        there = (columns < end[:, :1])[:, None, :] & (rows < end[:, 1:])[:, :, None]
        return np.unique((rows[:, :, None] * self.grid[0] + columns[:, None, :])[there], return_counts=True)

    def _count_uses(self, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        """(tiles,): how many regions need each tile; +1 and -1 at the corners of each, summed up."""
        steps = np.zeros((self.grid[1] + 1, self.grid[0] + 1), np.int32)
        for x, y, sign in ((first, first, 1), (end, first, -1), (first, end, -1), (end, end, 1)):
            np.add.at(steps, (y[:, 1], x[:, 0]), sign)
        return np.ascontiguousarray(steps.cumsum(axis=0).cumsum(axis=1)[:-1, :-1], np.int32).ravel()

    def _claim(self, needed: np.ndarray) -> np.ndarray:
        """Those of the needed tiles that this thread has to decode; all of them are now held for it.

        A thread that has to wait for room holds nothing, so that those who hold can always go on.
        """
        with self._changed:
            while True:
                mine = needed[(self.slots[needed] < 0) & ~self.ready[needed]]
                if len(mine) > len(self.free):
                    self._make_room(len(mine) - len(self.free), needed)
                if len(mine) <= len(self.free):
                    break
                self._changed.wait()
            self.users[needed] += 1
            self.slots[mine] = [self.free.pop() for _ in mine]
            return mine

    def _make_room(self, count: int, needed: np.ndarray) -> None:
        unused = self.ready & (self.slots >= 0) & (self.users == 0)
        unused[needed] = False
        self._drop(np.flatnonzero(unused)[:count])

    def _drop(self, tiles: np.ndarray) -> None:
        self.free += [slot for slot in self.slots[tiles].tolist() if slot >= 0]
        self.slots[tiles], self.ready[tiles] = -1, False

    def _decode(self, tiles: np.ndarray) -> None:
        """Decode these tiles; what goes wrong stands in `faulty`, also for the threads that wait for them."""
        mean_of = self.mean_of
        whole = np.empty((self.tile_height * mean_of, self.tile_width * mean_of, 3), np.uint8) if mean_of > 1 else None
        try:
            for tile, slot in zip(tiles.tolist(), self.slots[tiles].tolist(), strict=True):
                row, column = divmod(tile, self.tiles.columns)
                pixels = self.decoded[slot]
                self.faulty.pop(tile, None)
                try:
                    self.tiles.decode(row, column, self.scale, pixels if whole is None else whole)
                except (DamagedTileError, MissingTileError) as error:
                    self.faulty[tile] = error
                    continue
                if whole is not None:
                    cv2.resize(whole, pixels.shape[1::-1], dst=pixels, interpolation=cv2.INTER_AREA)
        except BaseException as error:
            self.faulty |= dict.fromkeys(tiles.tolist(), error)
            raise
        finally:
            with self._changed:
                self.ready[tiles] = True
                self._changed.notify_all()

    def _errors(self, needed: np.ndarray, first: np.ndarray, end: np.ndarray) -> Errors:
        """Of each region whose tiles are not all sound: what is wrong with one of them, damage first."""
        errors: Errors = {}
        for tile in needed.tolist() if self.faulty else ():
            if (error := self.faulty.get(tile)) is None:
                continue
            if not isinstance(error, DamagedTileError | MissingTileError):
                raise error  # of the file system, which another thread has met
            row, column = divmod(tile, self.tiles.columns)
            touched = ((first <= (column, row)) & (end > (column, row))).all(axis=1)
            for i in np.flatnonzero(touched).tolist():
                if not isinstance(errors.get(i), DamagedTileError):
                    errors[i] = error
        return errors

    def _paste(self, indices: np.ndarray, out: np.ndarray, errors: Errors) -> None:
        tiles = self.decoded.reshape(self.room, self.tile_height, -1)
        given = self.slots, self.tiles.columns, self.width, self.height
        if self.side == self.patch_px and not self.fraction.any():
            paste(tiles, *given, self.first[indices], out.reshape(len(out), self.side, -1))
            return
        for i, index in enumerate(indices.tolist()):
            if i in errors:
                continue
            dx, dy = self.fraction[index].tolist()
            side = self.side + bool(dx or dy)
            region = np.empty((side, side, 3), np.uint8)
            paste(tiles, *given, self.first[index : index + 1], region.reshape(1, side, -1))
            if dx or dy:
                (x, y), places = self.first[index].tolist(), np.arange(side)
                region = paint_between(
                    region, max(0, self.width - x), max(0, self.height - y),
                    np.float32(dx / FRACTIONS), np.float32(dy / FRACTIONS),
                    (x + places) % self.tile_width == 0, (y + places) % self.tile_height == 0,
                )  # fmt: skip
            out[i] = resize(region, (self.patch_px, self.patch_px))

    def _release(self, needed: np.ndarray, counts: np.ndarray) -> None:
        with self._changed:
            self.uses[needed] -= counts
            self.users[needed] -= 1
            self._drop(needed[(self.uses[needed] <= 0) & (self.users[needed] == 0)])
            self._changed.notify_all()


@numba.njit(nogil=True, cache=True)
def paste(
    tiles: np.ndarray, slots: np.ndarray, columns: int, width: int, height: int, first: np.ndarray, out: np.ndarray
) -> None:
    """Regions from tiles: out (B, side, 3 * side), tiles (slots, tile height, 3 * tile width), both uint8.

    slots (rows * columns,): where each tile lies. first (B, 2): the regions' corners. White outside width x height.
    """
    side, tile_height, tile_width = out.shape[1], tiles.shape[1], tiles.shape[2] // 3
    for i in range(len(out)):
        left, top = first[i, 0], first[i, 1]
        right, bottom = min(left + side, width), min(top + side, height)
        if right < left + side or bottom < top + side:
            out[i] = 255
        if right <= left or bottom <= top:
            continue
        for row in range(top // tile_height, (bottom - 1) // tile_height + 1):
            for column in range(left // tile_width, (right - 1) // tile_width + 1):
                slot, tile_left, tile_top = slots[row * columns + column], column * tile_width, row * tile_height
                x0, x1 = max(left, tile_left), min(right, tile_left + tile_width)
                for y in range(max(top, tile_top), min(bottom, tile_top + tile_height)):
                    source = tiles[slot, y - tile_top, 3 * (x0 - tile_left) : 3 * (x1 - tile_left)]
                    target = out[i, y - top, 3 * (x0 - left) : 3 * (x1 - left)]
                    for j in range(len(target)):  # which becomes a copy of memory, unlike target[:] = source
                        target[j] = source[j]
