"""An encoder on its device: batches go in as they are read, features come out in order.

On a GPU all batches have one shape; each is copied on a stream of its own while the network computes the one before,
and the network's kernels are launched at once, as a CUDA graph, where they can be captured.
"""

import logging
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from preprocessing.encoders import Encoder
from slidestore.settings import own_function

AHEAD = 2  # batches that a GPU is given before it has computed them; more would only take memory

log = logging.getLogger(__name__)


def choose_device() -> torch.device:
    """The GPU that the scheduler lets us see, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_repeatable(threads: int) -> None:
    """Features are then equal from run to run for the same device, versions and number of threads: on a GPU by the same
    kernels each time, and fp32 is IEEE's, not TF32."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def memory_for_pixels(device: torch.device) -> Callable[..., np.ndarray]:
    """numpy.empty; for a GPU, of memory from which it copies while the CPU goes on."""

    def pinned(shape: tuple[int, ...], dtype: type[np.uint8]) -> np.ndarray:
        assert dtype is np.uint8
        array: np.ndarray = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
        return array

    return pinned if device.type == "cuda" else np.empty


class Network:
    """(B, P, P, 3) uint8 RGB -> (B, D) float16 on the device, batch after batch; B at most the encoder's batch size."""

    def __init__(self, encoder: Encoder, patch_px: int, device: torch.device, graph: bool | None = None) -> None:
        """graph: capture a CUDA graph; by default for what timm makes, which is known not to look at its own values."""
        self.device = device
        # Patches come as (B, P, P, 3), the layout that convolutions on a GPU are fastest in.
        self.encoder = encoder.to(device).to(memory_format=torch.channels_last)
        self.on_gpu = device.type == "cuda"
        self.compute: Callable[[], torch.Tensor] = self._compute
        if not self.on_gpu:
            return
        self.copying = torch.cuda.Stream(device)
        # What is copied or computed, and from which memory: it is kept for so long.
        self.running: deque[tuple[torch.cuda.Event, object]] = deque()
        self.input = torch.zeros((encoder.settings.batch_size, patch_px, patch_px, 3), dtype=torch.uint8, device=device)
        if graph if graph is not None else own_function(encoder.settings.model) is None:
            try:
                self._capture()
            except RuntimeError as error:
                log.info("%s runs without a CUDA graph: %s", encoder.settings.model, str(error).splitlines()[0])

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
        """The features of a batch, an array or a tensor on the device.

        On a GPU they are computed later, as all work of the current stream is, and hold until the next call.
        """
        count = len(pixels)
        if not self.on_gpu:
            self.input = torch.as_tensor(pixels)
            return self.compute()
        current = torch.cuda.current_stream(self.device)
        if isinstance(pixels, np.ndarray):
            with torch.cuda.stream(self.copying):
                there = torch.from_numpy(pixels).to(self.device, non_blocking=True)
            current.wait_stream(self.copying)
        else:
            there = pixels
        there.record_stream(current)  # its memory is of another stream
        self.input[:count].copy_(there)
        features = self.compute()[:count]
        event = torch.cuda.Event(blocking=True)
        event.record(current)
        self.running.append((event, pixels))
        if len(self.running) > AHEAD:
            self.running.popleft()[0].synchronize()
        return features

    def _compute(self) -> torch.Tensor:
        return self.encoder(self.input.permute(0, 3, 1, 2)).to(torch.float16)

    @torch.inference_mode()
    def _capture(self) -> None:
        """From now on `compute` replays one recording of the kernels."""
        current, aside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):  # libraries choose kernels and take workspaces at the first calls
            for _ in range(3):
                self._compute()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls count: others may be reading already.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self._compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        self.compute = replay
