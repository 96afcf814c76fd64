"""The Triton kernel of rope against the formula."""

import pytest
import torch
from parity import random
from triton_engine import DEVICE, DTYPES, check_op, gpu, opcheck, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.ops import reference

pytestmark = pytest.mark.usefixtures("triton_engine")

both = pytest.mark.parametrize("interleaved", [False, True])


def check(shape, pairs, interleaved, dtype=torch.float32, prepare=lambda x: x):
    cos, sin = ops.rope_tables(2 * pairs, shape[2], start=3)

    def formula(x):
        return reference.rope(prepare(x), cos.to(x.device), sin.to(x.device), interleaved, False)

    check_op(
        lambda x: ops.rope(prepare(x), cos.to(x.device), sin.to(x.device), interleaved=interleaved),
        formula,
        formula,
        [random(*shape, dtype=dtype)],
    )


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "pairs"), [((1, 1, 1, 2), 1), ((2, 3, 5, 16), 8), ((1, 5, 7, 21), 6)], ids=str)
def test_parity(shape, pairs, interleaved, dtype):
    check(shape, pairs, interleaved, dtype)


@both
def test_heads_of_a_fused_projection_are_read_in_place(interleaved):
    check((2, 4, 3, 24), 4, interleaved, prepare=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)[..., 8:16])


def test_strided_elements_nothing_to_turn_and_nothing():
    check((2, 2, 6, 8), 4, False, prepare=lambda x: x.transpose(1, 2).contiguous().flip(3).transpose(1, 2))
    x = random(2, 3, 4, 6).to(DEVICE)
    none = torch.empty(4, 0, device=DEVICE)
    torch.testing.assert_close(ops.rope(x, none, none), x, rtol=0, atol=0)
    cos, sin = (table.to(DEVICE) for table in ops.rope_tables(6, 4))
    assert ops.rope(x[:0], cos, sin).shape == (0, 3, 4, 6)


def test_the_memory_of_b_t_h_d():
    cos, sin = (table.to(DEVICE) for table in ops.rope_tables(8, 5))
    assert ops.rope(random(2, 3, 5, 8).to(DEVICE), cos, sin).transpose(1, 2).is_contiguous()


def test_opcheck():
    cos, sin = (table.to(DEVICE) for table in ops.rope_tables(8, 5))
    for interleaved in (False, True):
        opcheck(torch.ops.fastgpt.rope.default, (random(2, 3, 5, 8).to(DEVICE), cos, sin, interleaved, False))


class TestRealSizes:
    pytestmark = gpu

    @both
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("dim", "pairs"), [(64, 32), (128, 64), (80, 16)])
    def test_parity(self, dim, pairs, interleaved, dtype):
        check((4, 12, 1025, dim), pairs, interleaved, dtype)
