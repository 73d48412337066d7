"""The Triton scan agrees with the recurrence as written: interpreted, or compiled with TRITON_INTERPRET=0."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gmmamba.models import scan_triton
from gmmamba.models.scan import torch_scan
from gmmamba.models.scan_triton import triton_scan
from gmmamba.verify import verify

pytest.importorskip("triton", reason="needs Triton, a part of PyTorch's CUDA builds")
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds a step, also for the masked ones."""
    monkeypatch.setattr(scan_triton, "CHUNK", 8)


def inputs(sizes: list[int], K: int, E: int, S: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """u, dt, A, B, C; A in at least float32, as the model holds it."""
    generator = torch.Generator().manual_seed(0)
    N = sum(sizes)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    u, dt, A = random(K, N, E), random(K, N, E).exp(), -random(K, E, S).exp()
    arguments = [x.to(DEVICE, dtype) for x in (u, dt, A, random(K, N, S), random(K, N, S))]
    arguments[2] = arguments[2].to(torch.promote_types(dtype, torch.float32))
    return [x.requires_grad_() for x in arguments]


def outputs_and_gradients(scan, arguments: list[Tensor], sizes: list[int], reverse: list[bool]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    y = scan(*arguments, sizes, reverse)
    dy = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y).bfloat16().to(y.dtype)
    return [y, *torch.autograd.grad(y, arguments, dy)]


def assert_agrees(arguments: list[Tensor], sizes: list[int], reverse: list[bool], tolerance: float) -> None:
    """Errors relative to the largest magnitude; the reference gets the same inputs in the state's precision."""
    exact = [x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_() for x in arguments]
    ours = outputs_and_gradients(triton_scan, arguments, sizes, reverse)
    reference = outputs_and_gradients(torch_scan, exact, sizes, reverse)
    for value, argument, expected in zip(ours, [arguments[0], *arguments], reference, strict=True):
        assert value.dtype == argument.dtype
        assert value.shape == expected.shape
        assert (value - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    ("sizes", "reverse", "E", "S", "dtype", "tolerance"),
    [
        ([1], [False], 5, 1, torch.float32, 1e-5),
        ([5, 1, 3], [True, False], 40, 4, torch.float32, 1e-5),  # two blocks of channels, the second not full
        ([9, 1, 17], [False, True], 7, 16, torch.float32, 1e-5),  # groups beyond one and two chunks
        ([5, 8], [True], 3, 3, torch.float64, 1e-13),  # S no power of two, a full chunk
        ([9, 2], [False, True], 40, 4, torch.bfloat16, 1e-2),
        ([9, 2], [False, True], 3, 4, torch.float16, 2e-3),
    ],
)
def test_agrees_with_the_reference_scan(
    sizes: list[int], reverse: list[bool], E: int, S: int, dtype: torch.dtype, tolerance: float
) -> None:
    assert_agrees(inputs(sizes, len(reverse), E, S, dtype), sizes, reverse, tolerance)


def test_agrees_with_the_reference_scan_at_full_chunk_length() -> None:
    sizes, reverse = [70, 1, 130], [False, True]
    assert_agrees(inputs(sizes, 2, 5, 16), sizes, reverse, 1e-5)


@pytest.mark.usefixtures("short_chunks")
def test_precisions_may_differ_as_under_autocast() -> None:
    sizes, reverse = [9, 2], [False, True]
    u, dt, A, B, C = inputs(sizes, 2, 5, 4)
    assert_agrees([u, dt, A, *(x.detach().bfloat16().requires_grad_() for x in (B, C))], sizes, reverse, 1e-2)


@pytest.mark.usefixtures("short_chunks")
def test_groups_do_not_see_each_other_and_runs_are_bit_identical() -> None:
    sizes, reverse = [3, 9, 2], [False, True]
    arguments = inputs(sizes, 2, 40, 4)
    first, second = (outputs_and_gradients(triton_scan, arguments, sizes, reverse) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    u, dt, A, B, C = (x.detach().clone() for x in arguments)
    for x in (u, dt, B, C):
        x[:, 3:12] *= 3
    other = outputs_and_gradients(triton_scan, [x.requires_grad_() for x in (u, dt, A, B, C)], sizes, reverse)
    for i in (0, 1, 2, 4, 5):  # y and the gradients of u, dt, B and C
        for x, (group, changed) in zip(first[i].split(sizes, 1), enumerate(other[i].split(sizes, 1)), strict=True):
            assert torch.equal(x, changed) == (group != 1)


@pytest.mark.usefixtures("short_chunks")
def test_strided_inputs_and_no_gradient() -> None:
    arguments = [x.detach().flip(0) for x in inputs([4, 7], 2, 5, 3)]
    arguments = [x.mT.contiguous().mT for x in arguments]
    expected = torch_scan(*arguments, [4, 7], [False, True])
    torch.testing.assert_close(triton_scan(*arguments, [4, 7], [False, True]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="replays on the CPU")
def test_replays_a_reference_case(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_chunks: None
) -> None:
    """A whole GMMamba, forward and backward, in float32 and float64."""
    source, case = shared / "reference" / "gmmamba", "t02"
    for path in source.glob(f"{case}_*"):
        shutil.copy(path, tmp_path)
    manifest = json.loads((source / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({case: manifest[case]}))
    monkeypatch.setattr(scan_triton, "BLOCK_E", 64)  # one program for all channels: fewer steps to interpret
    assert verify(tmp_path, scan="triton")


COMPILE = """
import re, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gmmamba.models import scan_triton, scan_triton_kernels as kernels

STATES = ("kept", "states", "g_A", "g_B", "g_C")
for kernel in (kernels.scan_forward, kernels.scan_backward):
    for inputs, state in (("*fp32", tl.float32), ("*bf16", tl.float32), ("*fp64", tl.float64)):
        constants = {"KEEP": True, "E": 1024, "S": 16, "BLOCK_S": 16, "STATE": state}
        constants |= {"CHUNK": scan_triton.CHUNK, "BLOCK_E": scan_triton.BLOCK_E}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        types = dict.fromkeys(kernel.arg_names, inputs) | dict.fromkeys(constants, "constexpr")
        types |= {name: f"*{state}" for name in STATES} | {"plan": "*i64", "rows": "i32"}
        types = {name: types[name] for name in kernel.arg_names}
        source = ASTSource(kernel, types, constants)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ptx"]
        assert re.search(r"\\.entry\\s+" + kernel.__name__, ptx)
        assert not re.search(r"\\b(atom|red)\\.", ptx), "two runs could differ"
        print("compiled", kernel.__name__, inputs)
"""


def python_without_interpreter(code: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)


def test_kernels_compile_for_a_gpu_without_atomics(tmp_path: Path) -> None:
    """The interpreter takes much that the compiler does not; compiling needs no GPU."""
    process = python_without_interpreter(COMPILE, tmp_path)
    assert process.stdout.count("compiled") == 6, process.stderr


def test_off_the_gpu_the_error_names_the_remedy(tmp_path: Path) -> None:
    code = (
        "import torch; from gmmamba.models.scan_triton import *; triton_scan(*[torch.ones(1, 1, 1)] * 5, [1], [False])"
    )
    error = python_without_interpreter(code, tmp_path).stderr
    assert "scan 'triton' runs on a GPU, and its inputs are on 'cpu': move model and data to a GPU" in error


def test_without_triton_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="scan 'triton' needs the package triton: install a CUDA build of PyTorch"):
        triton_scan(*inputs([2], 1, 1, 1), [2], [False])
