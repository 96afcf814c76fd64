"""fastgpt/ops/cuda_attention.py with the emulator in the place of the module: addresses, strides, sizes and the choice of kernels."""

from typing import Any

import pytest
import torch
from parity import assert_parity, random
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from emu import test_attention_sm80, test_attention_sm90
from emu.build import compiler
from emu.emulator import Emulator
from fastgpt.ops import backend, cuda, cuda_attention, reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")


@pytest.fixture(scope="module")
def emulators() -> dict[int, Emulator]:
    return {
        80: Emulator("attention_sm80", test_attention_sm80.BUGS),
        90: Emulator("attention_sm90", test_attention_sm90.BUGS + test_attention_sm90.ORDER_BUGS),
    }


@pytest.fixture
def calls(emulators: dict[int, Emulator], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The engine with launches that go to the emulator; what was launched, and for which chip."""
    made: list[tuple[str, int]] = []

    def launch(name: str, device: torch.device, *args: Any) -> None:
        flat: list[Any] = []
        for arg in args:
            flat.extend(arg if isinstance(arg, tuple) else [arg])
        made.append((name, args[0]))
        emulators[args[0]](name, *(int(x) if isinstance(x, bool) else x for x in flat))

    monkeypatch.setattr(cuda, "_launch", launch)
    monkeypatch.setattr(cuda, "_check", lambda *_: None)
    monkeypatch.setattr(cuda_attention, "_capability", lambda _: (9, 0))
    return made


def layouts(name: str, *shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(B, H, T, D) in several layouts of memory."""
    batch, heads, time, dim = shape
    if name == "heads between rows":
        return random(batch, time, heads, dim, dtype=dtype, seed=seed).transpose(1, 2)
    if name == "a part of wider rows":
        return random(batch, time, heads, 3 * dim, dtype=dtype, seed=seed).transpose(1, 2)[..., dim : 2 * dim]
    if name == "rows off by one element":
        return random(batch, heads, time, dim + 1, dtype=dtype, seed=seed)[..., 1:]
    if name == "transposed":
        return random(batch, heads, dim, time, dtype=dtype, seed=seed).transpose(2, 3)
    if name == "one key head for all":
        return random(batch, 1, time, dim, dtype=dtype, seed=seed).expand(shape)
    return random(*shape, dtype=dtype, seed=seed)


LAYOUTS = [
    "plain",
    "heads between rows",
    "a part of wider rows",
    "rows off by one element",
    "transposed",
    "one key head for all",
]


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_backward_in_every_layout(
    calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, chip: int, layout: str
) -> None:
    monkeypatch.setenv("FASTGPT_CUDA_SM90", "1" if chip == 90 else "0")
    dtype = torch.float16 if layout == "plain" else torch.bfloat16
    q = layouts(layout, 2, 4, 33, 64, dtype=dtype, seed=1)
    k, v = (layouts(layout, 2, 2, 70, 64, dtype=dtype, seed=s) for s in (2, 3))
    grad = layouts(layout, 2, 4, 33, 64, dtype=dtype, seed=4)
    out, lse = cuda_attention._attention(q, k, v, True, 0.2)
    gradients = cuda_attention._attention_backward(grad, q, k, v, out, lse, True, 0.2)
    assert calls == [("attention", chip), ("attention_backward", chip)]

    wide_q, wide_k, wide_v = (x.double() for x in (q, k, v))
    exact, exact_lse = reference.attention(wide_q, wide_k, wide_v, True, 0.2)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    seen = reference.causal_mask(33, 70, q.device)
    theirs = scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], attn_mask=seen, enable_gqa=True, scale=0.2)
    assert_parity(out, theirs, exact, "out")
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    exact_gradients = reference.attention_backward(grad.double(), wide_q, wide_k, wide_v, exact, exact_lse, True, 0.2)
    torchs = torch.autograd.grad(theirs, leaves, grad)
    for name, mine, other, right in zip("qkv", gradients, torchs, exact_gradients, strict=True):
        assert_parity(mine, other, right, f"gradient of {name}")


OFFSETS = torch.tensor([0, 13, 13, 40]), torch.tensor([0, 50, 51, 70])
OPTIONS: dict[str, tuple[Any, ...]] = {  # the op's arguments after scale
    "window": (False, 0.0, None, 9, 3),
    "packed": (True, 0.0, None, -1, -1, 0.0, *OFFSETS, 27, 50),
    "packed, 32 bits": (False, 0.0, None, 20, -1, 0.0, *(x.int() for x in OFFSETS), 27, 50),
    "dropout": (True, 0.25, torch.tensor(77)),
    "all": (True, 0.25, torch.tensor(-1), 30, -1, 0.0, *OFFSETS, 27, 50),
}


@pytest.mark.parametrize("way", ["deterministic", "fast"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_kernels_for_hopper(
    calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    monkeypatch.setenv("FASTGPT_CUDA_SM90", "1")
    monkeypatch.setenv("FASTGPT_CUDA_SM90_BACKWARD", way)
    causal, *rest = OPTIONS[name]
    q, grad = (random(1, 4, 40, 64, dtype=torch.float16, seed=s) for s in (1, 4))
    k, v = (random(1, 2, 70, 64, dtype=torch.float16, seed=s) for s in (2, 3))
    out, lse = cuda_attention._attention(q, k, v, causal, 0.2, *rest)
    gradients = cuda_attention._attention_backward(grad, q, k, v, out, lse, causal, 0.2, *rest)
    assert calls == [("attention", 90), ("attention_backward", 90)]
    wide_q, wide_k, wide_v = (x.double() for x in (q, k, v))
    exact, exact_lse = reference.attention(wide_q, wide_k, wide_v, causal, 0.2, *rest)
    exact_gradients = reference.attention_backward(
        grad.double(), wide_q, wide_k, wide_v, exact, exact_lse, causal, 0.2, *rest
    )
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    for mine, right in zip((out, *gradients), (exact, *exact_gradients), strict=True):
        assert (mine.double() - right).abs().max() <= 2e-3 * right.abs().max()


def test_the_way_to_the_gradient_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, long, short in (("auto", True, False), ("fast", True, True), ("deterministic", False, False)):
        monkeypatch.setenv("FASTGPT_CUDA_SM90_BACKWARD", wanted)
        assert (cuda_attention.adds_grad_query(2049), cuda_attention.adds_grad_query(2048)) == (long, short)
    monkeypatch.setenv("FASTGPT_CUDA_SM90_BACKWARD", "")
    torch.use_deterministic_algorithms(True)
    try:
        assert not cuda_attention.adds_grad_query(4096)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("FASTGPT_CUDA_SM90_BACKWARD", "quick")
    with pytest.raises(ValueError, match="expected auto, fast or deterministic"):
        cuda_attention.adds_grad_query(1)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_without_the_kernels_for_hopper_go_to_the_next_engine(
    calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("FASTGPT_CUDA_SM90", "0")
    q, k = torch.zeros(1, 4, 40, 64).half(), torch.zeros(1, 2, 70, 64).half()
    causal, *rest = OPTIONS[name]
    with pytest.raises(backend.NotCovered, match="outside of attention_sm90"):
        cuda_attention._attention(q, k, k, causal, 1.0, *rest)
    monkeypatch.setenv("FASTGPT_CUDA_SM90", "1")
    with pytest.raises(backend.NotCovered, match="a soft cap"):
        cuda_attention._attention(q, k, k, causal, 1.0, 0.0, None, -1, -1, 30.0)
    assert calls == []


def test_results_have_the_layout_that_the_op_promises(calls: list[tuple[str, int]]) -> None:
    q = random(2, 3, 17, 32, dtype=torch.bfloat16)
    out, lse = cuda_attention._attention(q, q, q, False, 0.2)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()


def test_the_kernels_for_hopper_are_switched_on_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTGPT_CUDA_SM90", raising=False)
    assert cuda_attention.chip_for((9, 0), 64) == 80
    monkeypatch.setattr(cuda, "VERIFIED", frozenset({"attention_sm90"}))
    assert [cuda_attention.chip_for(chip, 64) for chip in ((8, 0), (9, 0), (10, 0))] == [80, 90, 80]
    assert cuda_attention.chip_for((9, 0), 96) == 80
    monkeypatch.setattr(cuda, "VERIFIED", frozenset())
    monkeypatch.setenv("FASTGPT_CUDA_SM90", "1")
    assert cuda_attention.chip_for((9, 0), 128) == 90


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": 80}, "a head size of 80; covered are 32, 64, 96, 128"),
        ({"dtype": torch.float32}, "dtype torch.float32"),
        ({"scale": -1.0}, "a scale of -1.0"),
        ({"dropout_p": 0.5}, "dropout"),
        ({"time": 0}, "empty tensors"),
    ],
)
def test_what_no_kernel_takes_goes_to_the_next_engine(
    calls: list[tuple[str, int]], change: dict[str, Any], reason: str
) -> None:
    options: dict[str, Any] = {"dim": 64, "dtype": torch.bfloat16, "scale": 1.0, "dropout_p": 0.0, "time": 20} | change
    q = torch.zeros(1, 2, options["time"], options["dim"], dtype=options["dtype"])
    with pytest.raises(backend.NotCovered, match=reason):
        cuda_attention._attention(q, q, q, True, options["scale"], options["dropout_p"], torch.tensor(1))
    assert calls == []


def test_tensors_elsewhere_are_not_covered() -> None:
    q = torch.zeros(1, 1, 4, 64, dtype=torch.bfloat16)
    with pytest.raises(backend.NotCovered, match="tensors on cpu"):
        cuda_attention._attention(q, q, q, True, 1.0)
