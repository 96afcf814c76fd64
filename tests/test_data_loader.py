"""Token files and batches."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data.loader import EvalBatches, Loader
from fastgpt.data.tokens import open_tokens, pieces, token_dtype, write_tokens
from fastgpt.errors import UserError


class Bytes:
    """A tokenizer of the 256 bytes and an end-of-text token, with as large a vocabulary as wanted."""

    def __init__(self, n_vocab: int = 257, eot_token: int | None = 256) -> None:
        self.n_vocab, self.eot_token = n_vocab, eot_token

    def encode_numpy(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)


@pytest.mark.parametrize(("n_vocab", "dtype"), [(257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_token_files_round_trip(tmp_path, n_vocab, dtype):
    tokenizer = Bytes(n_vocab)
    tokenizer.eot_token = n_vocab - 1
    write_tokens(tmp_path, tokenizer, {"train": ["ab", "ç"], "val": ["xyz"]}, source="test")
    tokens = open_tokens(tmp_path)
    end = n_vocab - 1
    assert tokens.train.dtype == dtype
    assert tokens.train.tolist() == [97, 98, end, 0xC3, 0xA7, end]
    assert tokens.val.tolist() == [120, 121, 122, end]
    assert tokens.meta["train"]["bytes"] == 4
    assert tokens.bytes_per_token("val") == 3 / 4
    assert isinstance(tokens.train, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens.train[0] = 1


def test_without_an_end_of_text_token_documents_are_separated_by_lines(tmp_path):
    write_tokens(tmp_path, Bytes(256, None), {"train": ["a", "b"], "val": ["c"]}, source="test")
    tokens = open_tokens(tmp_path)
    assert (tokens.train.tolist(), tokens.val.tolist()) == ([97, 10, 98, 10], [99])


@settings(deadline=None)
@given(st.text(alphabet="ab\n", max_size=200), st.integers(1, 50))
def test_pieces_put_together_are_the_text(text, size):
    cut = list(pieces(text, size))
    assert "".join(cut) == text
    assert all(0 < len(piece) <= size for piece in cut)


def test_pieces_end_at_lines():
    text = "".join(f"line {n}\n" for n in range(100))
    assert all(piece.endswith("\n") for piece in pieces(text, 50))


@pytest.mark.parametrize("damage", ["cut", "missing", "not json", "foreign"])
def test_damaged_token_files(tmp_path, damage):
    write_tokens(tmp_path, Bytes(), {"train": ["abc"], "val": ["xyz"]}, source="test")
    if damage == "cut":
        (tmp_path / "train.bin").write_bytes((tmp_path / "train.bin").read_bytes()[:-1])
    elif damage == "missing":
        (tmp_path / "val.bin").unlink()
    elif damage == "not json":
        (tmp_path / "meta.json").write_text('{"format": "fastgpt-')
    else:
        (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 3}))
    with pytest.raises(UserError, match=r"damaged|does not describe"):
        open_tokens(tmp_path)


def test_dtype_boundaries():
    assert (token_dtype(2**16).itemsize, token_dtype(2**16 + 1).itemsize) == (2, 4)


TEXT = np.arange(1000, dtype=np.uint16)


@pytest.mark.parametrize("order", ["random", "shuffle"])
def test_targets_follow_inputs(order):
    loader = Loader(TEXT, 16, 5, seed=3, order=order)
    for step in range(20):
        x, y = loader.batch(step)
        assert x.shape == y.shape == (5, 16)
        assert x.dtype == y.dtype == torch.int64
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert torch.equal(y, x + 1)
        assert torch.equal(x, x[:, :1] + torch.arange(16))


@pytest.mark.parametrize("order", ["random", "shuffle"])
def test_a_batch_depends_on_seed_and_step_alone(order):
    loader = Loader(TEXT, 16, 5, seed=3, order=order)
    forward = [loader.batch(step)[0] for step in range(40)]
    other = Loader(TEXT, 16, 5, seed=3, order=order)
    assert all(torch.equal(other.batch(step)[0], forward[step]) for step in (39, 0, 17, 38, 1))
    assert not torch.equal(Loader(TEXT, 16, 5, seed=4, order=order).batch(0)[0], forward[0])
    assert not torch.equal(forward[0], forward[1])


@pytest.mark.parametrize("order", ["random", "shuffle"])
def test_micro_steps_make_up_the_larger_batch(order):
    """With accumulation no text is drawn twice: micro steps are numbered through."""
    loader = Loader(TEXT, 16, 5, seed=3, order=order)
    accumulated = [loader.batch(step, micro, 2)[0] for step in range(3) for micro in range(2)]
    assert all(torch.equal(accumulated[n], loader.batch(n)[0]) for n in range(6))


def test_random_crops_reach_both_ends():
    loader = Loader(np.arange(20, dtype=np.uint16), 16, 64, seed=0, order="random")
    assert set(loader.batch(0)[0][:, 0].tolist()) == {0, 1, 2, 3}
    only = Loader(np.arange(17, dtype=np.uint16), 16, 4, seed=0, order="random")
    assert only.batch(0)[1][:, -1].tolist() == [16] * 4


def test_another_order_is_refused():
    with pytest.raises(ValueError, match="order is 'sorted'; accepted is"):
        Loader(TEXT, 16, 1, seed=0, order="sorted")


def test_an_epoch_reads_each_block_once():
    loader = Loader(TEXT, 16, 5, seed=3)
    n_blocks = loader.n_blocks
    assert loader.steps_per_epoch(2) == n_blocks / 10
    firsts = torch.cat([loader.batch(step)[0][:, 0] for step in range(3 * n_blocks)]).tolist()
    orders = []
    for epoch in range(3):
        starts = firsts[epoch * n_blocks : (epoch + 1) * n_blocks]
        assert len(set(starts)) == n_blocks
        assert {b - a for a, b in zip(sorted(starts), sorted(starts)[1:], strict=False)} == {16}
        orders.append(starts)
    assert orders[0] != orders[1] != orders[2]


@settings(deadline=None)
@given(n=st.integers(17, 300), batch_size=st.integers(1, 7), step=st.integers(0, 2**40), seed=st.integers(0, 2**63 - 1))
def test_any_length_and_step_stay_inside_the_text(n, batch_size, step, seed):
    text = np.arange(n, dtype=np.uint16)
    for order in ("random", "shuffle"):
        x, y = Loader(text, 16, batch_size, seed, order=order).batch(step)
        assert int(x.min()) >= 0
        assert int(y.max()) < n
        assert torch.equal(y, x + 1)


def test_too_short_text_is_refused():
    with pytest.raises(UserError, match=r"16 tokens, too few for model\.block_size 16.*at most 15"):
        Loader(np.arange(16, dtype=np.uint16), 16, 1, seed=0)
    with pytest.raises(UserError, match="validation text has 3 tokens"):
        EvalBatches(np.arange(3), 16, 1, 100)


def test_validation_blocks_are_fixed_spread_and_do_not_overlap():
    batches = EvalBatches(TEXT, 16, 4, n_tokens=160)
    assert batches.n_tokens == 160
    first = [x[:, 0].tolist() for x, _ in batches]
    assert first == [x[:, 0].tolist() for x, _ in batches]
    assert [len(rows) for rows in first] == [4, 4, 2]
    starts = [start for rows in first for start in rows]
    assert starts[0] == 0
    assert starts[-1] > 800
    assert min(b - a for a, b in itertools.pairwise(starts)) >= 16


def test_all_of_a_short_validation_text_is_read():
    batches = EvalBatches(np.arange(33), 16, 4, n_tokens=10**9)
    assert torch.cat([y for _, y in batches]).flatten().tolist() == list(range(1, 33))


@pytest.mark.parametrize("order", ["shuffle", "random"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_a_batch_without_overlap(order: str, world_size: int) -> None:
    """Any number of processes together read exactly what one reads, row for row."""
    tokens = np.arange(1000, dtype=np.uint16)
    one = Loader(tokens, 8, 6, seed=4, order=order)
    ranks = [Loader(tokens, 8, 6, seed=4, order=order, rank=r, world_size=world_size) for r in range(world_size)]
    for step in (0, 7, 40):
        for micro in (0, 1):
            x, y = one.batch(step, micro, 2)
            parts = [loader.batch(step, micro, 2) for loader in ranks]
            assert torch.cat([part[0] for part in parts]).equal(x)
            assert torch.cat([part[1] for part in parts]).equal(y)


def test_ranks_that_do_not_fit() -> None:
    tokens = np.arange(100, dtype=np.uint16)
    with pytest.raises(UserError, match=r"batch_size is 6; accepted is a multiple of the 4 processes"):
        Loader(tokens, 8, 6, seed=1, world_size=4)
    with pytest.raises(ValueError, match="rank is 2"):
        Loader(tokens, 8, 6, seed=1, rank=2, world_size=2)
