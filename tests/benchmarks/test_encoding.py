"""The encoding benchmark measures what it says, on a small slide and the CPU."""

from pathlib import Path

import pytest
import torch

from benchmarks.encoding import can_read, end_to_end, many_slides, network_alone
from benchmarks.reading import PATCH_PX, make_slide
from preprocessing.encoders import Encoder, EncoderSettings
from preprocessing.network import Network
from slidestore import open_store


def test_windows_and_whole_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_slide(tmp_path / "slide.svs", 4096)
    settings, cpu = EncoderSettings("bench", "test_resnet", "random", batch_size=16), torch.device("cpu")
    network = Network(Encoder(settings, PATCH_PX), PATCH_PX, cpu)
    assert network_alone(network, 16, 0.1) > 0
    for reader in ("exact", "openslide"):
        assert can_read(path, reader, cpu)
        rate, waited, busy = end_to_end(path, network, reader, 16, 2, 0.1)
        assert rate > 0
        assert 0 <= waited < 1
        assert busy is None
    assert not can_read(path, "nvjpeg", cpu)
    assert "nvjpeg is left out: reading.reader is nvjpeg, which needs an NVIDIA GPU" in capsys.readouterr().out

    patches, *_ = many_slides(path, tmp_path, 2, settings, "exact", 2)
    shapes = [open_store(tmp_path / f"{number}.zarr.zip").shape for number in range(2)]
    assert sum(rows for rows, _ in shapes) == int(patches) > 0
