"""What is each one's own of TransMIL, MHIM, S4MIL and MambaMIL; what all models share is in test_models.py."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gmmamba.models import create_model
from gmmamba.models.bag import Bag, MILModel
from gmmamba.models.bimamba import BiMamba, Mamba
from gmmamba.models.mambamil import SRMamba
from gmmamba.models.mhim import MHIM, unmasked
from gmmamba.models.nystrom import NystromAttention, pseudo_inverse, token_conv
from gmmamba.models.s4mil import S4D, causal_convolution, smooth_length
from gmmamba.models.transmil import fold

FLOAT64 = {"dtype": torch.float64}


def make_bag(N: int, in_dim: int = 24) -> Bag:
    x = torch.randn(N, in_dim, generator=torch.Generator().manual_seed(N))
    return Bag(x, torch.zeros(N, 2, dtype=torch.int32))


def make_mhim(seed: int = 0, **options: Any) -> MHIM:
    torch.manual_seed(seed)
    return MHIM(24, 3, width=32, **options)


@pytest.mark.parametrize("n", [1, 16, 63, 64, 65, 200])
def test_token_convolution_is_the_depthwise_convolution(n: int) -> None:
    torch.manual_seed(0)
    v, weight = torch.randn(3, n, 5, **FLOAT64), torch.randn(3, 33, **FLOAT64)
    expected = F.conv2d(v[None], weight[:, None, :, None], padding=(16, 0), groups=3)[0]
    torch.testing.assert_close(token_conv(v, weight), expected)


@pytest.mark.parametrize("N", [37, 300])
def test_float32_gradients_are_those_of_float64(N: int) -> None:
    """With oneDNN on, whose weight gradient of the value convolution is 5 % off for 256 tokens of the default width."""
    assert torch.backends.mkldnn.enabled
    torch.manual_seed(0)
    model, bag = create_model("transmil", 24, 2).eval(), make_bag(N)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        bag.features = bag.features.to(dtype)
        loss = model.to(dtype).training_loss(bag, torch.tensor([1]), 0.0)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for (name, _), single, double in zip(model.named_parameters(), *gradients, strict=True):
        assert (single - double).norm() <= 1e-4 * double.norm(), name


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
def test_the_class_token_s_row_is_what_it_gathers_the_values_with(n: int) -> None:
    torch.manual_seed(0)
    attention, x = NystromAttention(32).double().eval(), torch.randn(n, 32, **FLOAT64)
    torch.nn.init.zeros_(attention.res_conv)
    torch.nn.init.eye_(attention.to_out.weight)
    torch.nn.init.zeros_(attention.to_out.bias)
    out, row = attention(x)
    v = F.linear(x, attention.to_qkv.weight)[:, 64:].view(n, 8, 4)
    torch.testing.assert_close(torch.einsum("hn,nhd->hd", row, v).flatten(), out[0])


def test_one_landmark_stands_for_all_that_are_padding() -> None:
    """The inverse of 4 landmarks, the first of which counts 7 times, is that of all 10 of them."""
    torch.manual_seed(0)
    logits, count = torch.randn(2, 4, 4, **FLOAT64), torch.tensor([7.0, 1, 1, 1], **FLOAT64)
    place = torch.tensor([0] * 7 + [1, 2, 3])
    whole = pseudo_inverse(logits[:, place][:, :, place].softmax(2), torch.ones(10, **FLOAT64))
    once = torch.zeros(10, 4, **FLOAT64).index_put((torch.arange(10), place), torch.ones(10, **FLOAT64))
    merged = pseudo_inverse((logits + count.log()).softmax(2), count)
    torch.testing.assert_close(merged, (whole @ once)[:, [0, 7, 8, 9]])


def test_a_repeated_patch_has_the_attention_of_both_its_tokens() -> None:
    assert fold(torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 9]]), 5).tolist() == [[7, 9, 11, 13, 5]]


@pytest.mark.parametrize("encoder", ["abmil", "transmil"])
def test_the_teacher_begins_as_the_first_stage_and_follows_the_student(encoder: str) -> None:
    student, first = make_mhim(encoder=encoder, momentum=0.9), make_mhim(1, encoder=encoder, stage=1)
    own = {name: value.clone() for name, value in student.state_dict().items()}
    begun = {name: value.clone() for name, value in first.state_dict().items()}
    student.start_from(first, list)
    for name, value in student.state_dict().items():
        assert torch.equal(value, (begun if name.startswith("embed") else own)[name])
    assert len(list(student.parameters())) == len(list(first.parameters()))  # no teacher among them
    student.after_step(0.5)
    for name, value in student.teachers[0].state_dict().items():
        torch.testing.assert_close(value, 0.9 * begun[name] + 0.1 * student.state_dict()[name])
    assert all(torch.equal(value, begun[name]) for name, value in first.state_dict().items())


def test_a_momentum_that_rises_ends_at_1() -> None:
    student = make_mhim(momentum=0.0, momentum_to_1=True)
    student.start_from(make_mhim(1, stage=1), list)
    before = student.teachers[0].classifier.weight.clone()
    student.after_step(1.0)
    assert torch.equal(student.teachers[0].classifier.weight, before)
    student.after_step(0.0)
    assert torch.equal(student.teachers[0].classifier.weight, student.classifier.weight)


def test_the_first_stage_learns_alone_and_the_second_not_without_it() -> None:
    bag, label = make_bag(30), torch.tensor([1])
    first = make_mhim(stage=1).eval()
    torch.testing.assert_close(first.training_loss(bag, label, 0.0), F.cross_entropy(first(bag).logits, label))
    with pytest.raises(RuntimeError, match="call start_from"):
        make_mhim().training_loss(bag, label, 0.0)


def test_without_mask_and_consistency_the_second_stage_is_cross_entropy() -> None:
    bag, label = make_bag(30), torch.tensor([1])
    shares = {"mask_ratio": 0.0, "mask_ratio_high": 0.5, "consistency": 0.0}
    student = make_mhim(**shares).eval()
    student.start_from(make_mhim(1, stage=1), list)
    alone = F.cross_entropy(student(bag).logits, label)
    torch.testing.assert_close(student.training_loss(bag, label, 1.0), alone)  # the high mask has sunk to 0
    assert not torch.allclose(student.training_loss(bag, label, 0.0), alone)


@settings(deadline=None)
@given(
    N=st.integers(1, 60),
    heads=st.sampled_from([1, 8]),
    random=st.sampled_from([0.0, 0.3, 0.7]),
    low=st.sampled_from([0.0, 0.2, 0.8]),
    high=st.sampled_from([0.0, 0.02, 0.4]),
    drawn=st.sampled_from([0.5, 1.0]),
)
def test_what_the_student_sees(N: int, heads: int, random: float, low: float, high: float, drawn: float) -> None:
    attention = torch.randn(1, N, generator=torch.Generator().manual_seed(N)).expand(heads, N)  # heads that agree
    keep = unmasked(attention, (random, low, high, drawn)).tolist()
    assert keep == sorted(set(keep))
    masked = set(range(N)) - set(keep)
    by_attention = attention[0].argsort().tolist()
    lowest = set(by_attention[: math.ceil(N * low)])
    candidates = set(by_attention[N - math.ceil(N * high / drawn) :]) if high else set()
    if masked:
        assert lowest <= masked
        assert len(masked & candidates) >= math.ceil(len(candidates) * drawn)
        at_random = masked - lowest - candidates
        assert len(at_random) <= math.ceil(N * random)
        assert len(masked) <= len(lowest) + math.ceil(len(candidates) * drawn) + math.ceil(N * random)
    else:  # nothing to mask, or everything
        together = len(lowest) + len(candidates) + math.ceil(N * random)
        assert together == 0 or together >= N
    assert keep


@pytest.mark.parametrize("length", [1, 2, 3, 50, 1000])
def test_s4d_kernel_and_convolution_are_as_defined(length: int) -> None:
    torch.manual_seed(0)
    layer, u = S4D(6, 8).double(), torch.randn(6, length, **FLOAT64)
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    dtA = layer.log_dt.exp()[:, None] * A
    C = torch.view_as_complex(layer.C) * (dtA.exp() - 1) / A
    K = 2 * (C[..., None] * (dtA[..., None] * torch.arange(length)).exp()).sum(1).real
    torch.testing.assert_close(layer.kernel(length), K)
    lag = torch.arange(length)[:, None] - torch.arange(length)
    toeplitz = torch.where(lag >= 0, K[:, lag.clamp(min=0)], 0)
    torch.testing.assert_close(causal_convolution(u, K), (toeplitz @ u[..., None])[..., 0])


@given(n=st.integers(1, 200_000))
def test_smooth_lengths(n: int) -> None:
    smooth = smooth_length(n)
    assert n <= smooth <= max(n, n * 9 / 8)
    for prime in (2, 3, 5, 7, 11, 13):
        while smooth % prime == 0:
            smooth //= prime
    assert smooth == 1


def test_s4mil_keeps_no_state_of_every_mode_and_patch() -> None:
    """Backward needs a few embeddings of each patch; one kernel by modes, in complex numbers, would be 32."""
    model = create_model("ssmmil", 24, 2, width=64)
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.training_loss(make_bag(5000), torch.tensor([1]), 0.0)
    assert sum(saved.values()) / (5000 * 64 * 4) < 20


def half(mixer: Mamba, suffix: str) -> Mamba:
    """One branch of a mixer as a mixer of its own."""
    part = Mamba(16, d_state=4).double()
    names = {name: name.replace("A_", f"A{suffix}_") if name == "A_log" else name for name in part.state_dict()}
    for name in ("conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "D"):
        first, _, rest = name.partition(".")
        names[name] = f"{first}{suffix}" + (f".{rest}" if rest else "")
    part.load_state_dict({name: mixer.state_dict()[theirs] for name, theirs in names.items()})
    return part


@settings(deadline=None, max_examples=30)
@given(N=st.integers(1, 25), rate=st.sampled_from([None, 1, 2, 5, 10, 30]))
def test_a_mixer_of_two_branches_is_two_mixers(N: int, rate: int | None) -> None:
    """The second of them on the sequence in its own order: backward, or every r-th instance, filled up with zeros."""
    torch.manual_seed(0)
    mixer = (BiMamba(16, d_state=4) if rate is None else SRMamba(16, 4, rate)).double()
    x = torch.randn(N, 16, **FLOAT64)
    if rate is None:
        order = torch.arange(N).flip(0)
        filled = x
    else:
        k = math.ceil(N / rate)
        filled = torch.cat([x, x.new_zeros(rate * k - N, 16)])
        order = torch.empty(rate * k, dtype=torch.long)
        for i in range(k):
            for j in range(rate):
                order[j * k + i] = i * rate + j
    size = torch.tensor([N])
    second = half(mixer, "_b")(filled[order], torch.tensor([len(filled)]))
    expected = half(mixer, "")(x, size) + second[order.argsort()][:N]
    torch.testing.assert_close(mixer(x, size), expected)


def test_published_initial_weights_of_mambamil_overwrite_the_steps() -> None:
    mamba, published = (create_model("mambamil", 24, 2, width=32, init=init) for init in ("mamba", "published"))
    assert (published.get_parameter("mixers.0.dt_proj.bias") == 0).all()
    assert (mamba.get_parameter("mixers.0.dt_proj.bias") < -2).all()


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("transmil", {}, 2_410_002),
        ("mhim", {}, 329_346),
        ("mhim", {"encoder": "transmil"}, 2_410_002),
        ("ssmmil", {}, 823_810),
        ("mambamil", {"mixer": "mamba"}, 3_721_987),
        ("mambamil", {"mixer": "bimamba"}, 3_965_699),
        ("mambamil", {}, 3_965_699),
    ],
)
def test_published_number_of_parameters(method: str, options: dict[str, Any], expected: int) -> None:
    model: MILModel = create_model(method, 512, 2, **options)
    assert sum(p.numel() for p in model.parameters()) == expected
