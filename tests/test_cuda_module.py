"""The functions of fastgpt._cuda take what fastgpt/ops gives them: without a GPU each gets as far as its own checks, or the launch."""

import importlib.util

import pytest
import torch

needs_build = pytest.mark.skipif(
    importlib.util.find_spec("fastgpt._cuda") is None, reason="built without the CUDA kernels"
)
no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="the addresses are made up")
pytestmark = [needs_build, no_device]

ROW = (64, 64, 64)
PLAIN = (-1, -1, 0, 0, 0, 0, 0, 0, 1.0)
TENSORS = (16, ROW, 16, ROW, 16, ROW, 16, ROW, 16)


def sizes(heads: int = 1, dim: int = 64) -> tuple[int, ...]:
    return 1, heads, 1, 1, 1, dim


def attention(
    chip: int = 80,
    type: int = 1,
    tensors: tuple = TENSORS,
    of: tuple = sizes(),
    options: tuple = PLAIN,
    backward: bool = False,
) -> None:
    from fastgpt import _cuda

    grads = (16, ROW, 16, ROW, 16, ROW, 16, ROW, 16, 0) if backward else ()
    function = _cuda.attention_backward if backward else _cuda.attention
    function(chip, type, *tensors, of, 1.0, True, options, *grads, 0)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chip": 70}, "chip: expected 80 or 90, got 70"),
        ({"type": 0}, r"type: expected 1 \(bfloat16\) or 2 \(float16\), got 0"),
        ({"of": sizes(dim=80)}, "head_dim: expected 32, 64, 96 or 128, got 80"),
        ({"of": sizes(heads=0)}, "expected sizes of 1 and more"),
        ({"options": (5, *PLAIN[1:])}, "options: windows, packed sequences and dropout are for chip 90"),
        ({"chip": 90, "options": (-1, -1, 16, 16, 0, 16, 0, 0, 1.0)}, "packed sequences need a batch of 1"),
        ({"tensors": (16, ROW, 24, *TENSORS[3:])}, "key: rows must be 16-byte aligned"),
        (
            {"tensors": (*TENSORS[:5], (64, 64, 4), *TENSORS[6:])},
            "value: rows must be 16-byte aligned; got strides 64, 64, 4",
        ),
    ],
)
def test_attention_refuses_what_its_kernels_cannot_read(change: dict, message: str, backward: bool) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**change, backward=backward)


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("backward", [False, True])
def test_a_launch_without_a_device_raises(chip: int, backward: bool) -> None:
    with pytest.raises(RuntimeError, match=r"attention|tensor map|driver|device"):
        attention(chip, backward=backward)


def test_softmax_takes_the_strides_of_its_mask() -> None:
    from fastgpt import _cuda

    with pytest.raises(ValueError, match="type: expected"):
        _cuda.softmax(9, 16, 0, 16, 0, [0, 0, 0], 1, 1, 1, 8, 1.0, False, False, False, 0)


def test_decode_refuses_parts_that_leave_keys_out() -> None:
    from fastgpt import _cuda

    with pytest.raises(ValueError, match="parts that cover 100 keys, got 2 of 49"):
        _cuda.attention_decode(1, *TENSORS, (1, 1, 1, 1, 100, 64), 1.0, True, 2, 49, 16, 16, 0)
    with pytest.raises(RuntimeError, match=r"attention_decode|a kernel"):
        _cuda.attention_decode(0, *TENSORS, (1, 1, 1, 1, 100, 64), 1.0, True, 2, 50, 16, 16, 0)


ADDRESS = 256
MEMORY_BOUND = {
    "norm": (0, 0, 0, ADDRESS, 0, 0, 0, 0, *[ADDRESS] * 3, 1, 8, 1e-5),
    "norm_backward": (0, 0, *[ADDRESS] * 7, 0, 0, 0, 0, 1, 1, 8),
    "count_targets": (ADDRESS, ADDRESS, 3, -100),
    "cross_entropy": (0, *[ADDRESS] * 3, 0, ADDRESS, 0, 0, 1, 8, -100, 0.0, 0.0),
    "cross_entropy_backward": (0, *[ADDRESS] * 3, False, ADDRESS, 0, ADDRESS, 1, 8, -100, 0.0, 0.0),
    "scale_rows": (0, ADDRESS, ADDRESS, False, 1, 8),
    "bias_activation": (3, 0, 0, *[ADDRESS] * 3, 1, 1, 8),
    "bias_activation_backward": (3, 0, 0, *[ADDRESS] * 6, 1, 1, 8),
    "grad_norm": (0, ADDRESS, ADDRESS, 1, 1, *[ADDRESS] * 3),
    "adamw": (1, ADDRESS, ADDRESS, 1, 1, *[ADDRESS] * 4, 0, ADDRESS, 0.9, 0.9, 1e-8, 1.0, 0.1, 1.0, True),
    "embedding": (0, *[ADDRESS] * 3, 1, 4, 4),
    "embedding_backward": (0, 0, *[ADDRESS] * 4, 1, 4, 4, -1, False),
    "rope": (0, *[ADDRESS] * 4, *[8] * 6, 1, 1, 1, 8, 4, False, False),
}


@pytest.mark.parametrize("name", MEMORY_BOUND)
def test_memory_bound_launchers_get_as_far_as_the_launch(name: str) -> None:
    from fastgpt import _cuda

    with pytest.raises(RuntimeError, match=r"driver|device|kernel"):
        getattr(_cuda, name)(*MEMORY_BOUND[name], 0)


def test_types_that_no_kernel_has_are_refused() -> None:
    from fastgpt import _cuda

    half_params = (0, 0, 2, *MEMORY_BOUND["norm"][3:])
    with pytest.raises(ValueError, match="parameters have the rows' type or float32"):
        _cuda.norm(*half_params, 0)
    with pytest.raises(ValueError, match="shadows are bfloat16 or float16"):
        _cuda.adamw(0, *MEMORY_BOUND["adamw"][1:], 0)
