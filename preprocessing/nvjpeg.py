"""`reading.reader: nvjpeg`: a slide's JPEG tiles are decoded on the GPU, put together to patches and shrunk there.

nvJPEG is no libjpeg-turbo: it does not smooth the colours that JPEG stores at half size. On the seeded sample of a
slide its patches may differ from the exact ones, which are OpenSlide's, by TOLERANCE grey levels on average, else the
slide is read as by `exact`, with a warning; as is a batch that nvJPEG refuses, so that a damaged tile costs the patches
it touches.
"""

import threading
from collections.abc import Callable

import cv2
import numpy as np
import torch

from preprocessing.errors import SettingsError, SlideError
from preprocessing.jpeg_tiles import DamagedTileError, JpegTiles, MissingTileError
from preprocessing.patches import SAMPLE, Batch, PatchReader, ReadingSettings
from preprocessing.slide import Slide, resize

TOLERANCE = 3.0

_of_thread = threading.local()


def check_nvjpeg(device: torch.device) -> None:
    """SettingsError where nothing can be decoded on `device`."""
    remedy = "set reading.reader to exact or scaled"
    if device.type != "cuda":
        raise SettingsError(f"reading.reader is nvjpeg, which needs an NVIDIA GPU, and torch sees none: {remedy}")
    _, stream = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))
    try:
        decode([stream.tobytes()], device)
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingsError(f"reading.reader is nvjpeg, which this torchvision has not ({reason}): {remedy}") from error


def decode(streams: list[bytes], device: torch.device) -> list[torch.Tensor]:
    """(3, H, W) uint8 RGB on `device` of each JPEG stream; RuntimeError where one cannot be decoded."""
    from torchvision.io import ImageReadMode, decode_jpeg  # deprecated: without it only this reader is lost

    inputs = [torch.frombuffer(bytearray(stream), dtype=torch.uint8) for stream in streams]
    decoded: list[torch.Tensor] = decode_jpeg(inputs, mode=ImageReadMode.RGB, device=device)
    return decoded


class NvjpegReader(PatchReader):
    """Reads the patches of one slide; `pixels` of its batches are tensors on `device`, complete when they are returned.

    `device` may be the CPU, where libjpeg-turbo decodes, as in tests.
    """

    def __init__(
        self,
        slide: Slide,
        coords: np.ndarray,
        patch_px: int,
        mpp: float,
        settings: ReadingSettings | None = None,
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ) -> None:
        super().__init__(slide, coords, patch_px, mpp, settings)
        self.device, self.tiles = device, None
        corners = (coords / self.downsample).reshape(-1, 2)
        self.first = np.floor(corners).astype(np.int64)
        self.fraction = (corners - self.first).astype(np.float32)
        # What `resize` does along one side, as a matrix (patch_px, side).
        weights = resize(np.eye(self.side, dtype=np.float32), (self.side, patch_px))
        self.weights = torch.from_numpy(weights).to(device)
        if self.regions is None:
            return
        if not self.regions.tiles.is_jpeg:
            self.warnings.append("read as by exact: the slide's tiles are JPEG 2000, which nvJPEG does not decode")
        elif (problem := self._compare_with_exact(self.regions.tiles)) is not None:
            self.warnings.append(f"read as by exact, not by nvJPEG: {problem}")
        else:
            self.tiles = self.regions.tiles

    tiles: JpegTiles | None

    @property
    def route(self) -> str:
        return super().route if self.tiles is None else "nvjpeg"

    def read_batch(self, rows: np.ndarray, empty: Callable[..., np.ndarray] = np.empty) -> Batch:
        if self.tiles is not None:
            try:
                return Batch(rows, self._read_on_device(self.tiles, rows), rows[:0])
            except (DamagedTileError, MissingTileError):
                pass  # the exact reader knows which patches that costs
        return super().read_batch(rows, empty)

    def _strip_px(self, batch_size: int) -> int:
        """A batch is about a square of patches: none shares its tiles, and a square has the fewest at its edge."""
        return max(1, round(batch_size**0.5)) * self.side

    def _read_on_device(self, tiles: JpegTiles, rows: np.ndarray) -> torch.Tensor:
        """(B, P, P, 3) uint8. Raises DamagedTileError, MissingTileError."""
        decoded: list[torch.Tensor] = []
        if self.device.type != "cuda":
            return self._put_together(tiles, rows, decoded)
        if not hasattr(_of_thread, "stream"):
            _of_thread.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(_of_thread.stream):
            patches = self._put_together(tiles, rows, decoded)
            # Before the tiles' memory may be used again, by nvJPEG on a stream of its own.
            _of_thread.stream.synchronize()
        return patches

    @torch.inference_mode()
    def _put_together(self, tiles: JpegTiles, rows: np.ndarray, decoded: list[torch.Tensor]) -> torch.Tensor:
        """As `_read_on_device`; the tiles stay in `decoded`, as on a GPU the result is computed later."""
        # B patches of S x S pixels of the level, P x P in the end; (B, S): columns and rows of pixels, and of tiles.
        between = bool(self.fraction[rows].any())  # two pixels: one more is needed
        x, y = self.first[rows].T[:, :, None] + np.arange(self.side + between)
        inside = (x < tiles.width)[:, None, :] & (y < tiles.height)[:, :, None]
        x, y = np.minimum(x, tiles.width - 1), np.minimum(y, tiles.height - 1)
        tile_x, tile_y = x // tiles.tile_width, y // tiles.tile_height
        first_x, first_y = tile_x[:, :1], tile_y[:, :1]

        # table[b, i, j]: which of the decoded tiles is i below and j right of the first one of patch b
        shape = (len(rows), int((tile_y - first_y).max()) + 1, int((tile_x - first_x).max()) + 1)
        below = np.minimum(first_y + np.arange(shape[1]), tile_y[:, -1:])
        right = np.minimum(first_x + np.arange(shape[2]), tile_x[:, -1:])
        needed, table = np.unique(below[:, :, None] * tiles.columns + right[:, None, :], return_inverse=True)

        streams = [tiles.jpeg(*divmod(tile, tiles.columns)) for tile in needed.tolist()]
        try:
            decoded += decode(streams, self.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise DamagedTileError(f"among {len(streams)} tiles: {error}") from error
        expected = (3, tiles.tile_height, tiles.tile_width)
        if any(tuple(pixels.shape) != expected for pixels in decoded):
            raise DamagedTileError(f"among {len(streams)} tiles one is not of the shape {expected}")

        def there(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

        patch = torch.arange(len(rows), device=self.device)[:, None, None]
        tile = there(table.reshape(shape))[patch, there(tile_y - first_y)[:, :, None], there(tile_x - first_x)[:, None]]
        in_tile = there(y % tiles.tile_height)[:, :, None], there(x % tiles.tile_width)[:, None]
        regions = torch.stack(decoded)[tile, :, *in_tile]  # (B, S, S, 3)
        if not inside.all():
            regions = torch.where(there(inside)[..., None], regions, 255)
        if self.side == self.patch_px and not between:
            return regions
        across = down = self.weights  # (P, S)
        if between:  # (B, 1, P, S + 1): linear between two pixels, then the same
            at, next_to_it = (torch.nn.functional.pad(self.weights, ends) for ends in ((0, 1), (1, 0)))
            across, down = (at + f[:, None, None, None] * (next_to_it - at) for f in there(self.fraction[rows].T))
        shrunk = down @ regions.permute(0, 3, 1, 2).to(torch.float32) @ across.transpose(-1, -2)
        return (shrunk + 0.5).floor().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _compare_with_exact(self, tiles: JpegTiles) -> str | None:
        """What speaks against nvJPEG on the seeded sample; None where nothing does."""
        for row in np.random.default_rng(0).permutation(len(self.coords))[:SAMPLE]:
            try:
                expected = self.read(int(row))
                found = self._read_on_device(tiles, np.array([row]))[0].cpu().numpy()
            except (SlideError, MissingTileError):
                continue
            except DamagedTileError as error:
                return str(error)  # the exact reader had no such trouble
            if (difference := float(np.abs(found.astype(np.int16) - expected).mean())) > TOLERANCE:
                return f"at {tuple(self.coords[row].tolist())} they differ by {difference:.1f} grey levels on average"
        return None
