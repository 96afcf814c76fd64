"""KVCache: cached and uncached logits agree in fp32 and bf16, in whatever pieces the text is read; growth, truncation and bad use."""

from collections.abc import Iterator

import pytest
import torch

from fastgpt.infer import KVCache
from fastgpt.infer.cache import LayerKVCache
from fastgpt.model import GPT, GPTConfig


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose a lot to them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(**changes) -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "block_size": 160, "n_layer": 3, "n_head": 4, "n_embd": 64, "init": "he"} | changes
    return GPT(GPTConfig(**shape)).eval()


def read(model: GPT, idx: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """All logits, reading idx in chunks through a cache."""
    cache = KVCache(model.config)
    pieces = [model(chunk, cache=cache, all_logits=True)[0] for chunk in idx.split(chunks, dim=1)]
    assert cache.length == idx.shape[1]
    return torch.cat(pieces, dim=1)


CHUNKS = {"1": [1] * 160, "100+1": [100] + [1] * 60, "1+159": [1, 159], "mixed": [63, 1, 1, 95], "all": [160]}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones(n_kv_head: int, chunks: list[int]) -> None:
    model = build(n_kv_head=n_kv_head)
    idx = torch.randint(61, (2, 160))
    whole = model(idx, all_logits=True)[0]
    exact = model.double()(idx, all_logits=True)[0]
    cached = read(model.float(), idx, chunks)
    # No further from fp64 than twice the uncached fp32 pass, as a relative error over all logits.
    size = exact.norm()
    error, base = (cached - exact).norm() / size, (whole - exact).norm() / size
    assert error <= 2 * base + 1e-7, (error, base)


@pytest.mark.parametrize("how", ["weights", "autocast"])
@torch.no_grad()
def test_cached_logits_in_bf16(how: str) -> None:
    model = build(n_kv_head=2)
    idx = torch.randint(61, (2, 160))
    exact = build(n_kv_head=2).double()(idx, all_logits=True)[0]
    if how == "weights":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        whole = model(idx, all_logits=True)[0].double()
        cached = read(model, idx, [100] + [1] * 60).double()
    size = exact.norm()
    error, base = (cached - exact).norm() / size, (whole - exact).norm() / size
    assert error <= 2 * base, (error, base)
    assert (cached - whole).norm() / size <= 2 * base


@torch.no_grad()
def test_grows_in_steps_up_to_its_limit() -> None:
    model = build()
    cache = KVCache(model.config)
    assert cache.nbytes == 0
    a_token = 3 * 2 * 64 * 4  # layers, keys and values, heads times width, bytes
    sizes = []
    for _ in range(160):
        model(torch.tensor([[1]]), cache=cache)
        sizes.append(cache.nbytes // a_token)
    assert sorted(set(sizes)) == [64, 128, 160]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    with pytest.raises(ValueError, match="idx: got 1 tokens after 160 cached; accepted: at most block_size = 160"):
        model(torch.tensor([[1]]), cache=cache)


@torch.no_grad()
def test_truncate_and_reset_go_back() -> None:
    model = build()
    idx = torch.randint(61, (1, 30))
    cache = KVCache(model.config)
    model(idx, cache=cache)
    cache.truncate(10)
    torch.testing.assert_close(model(idx[:, 10:], cache=cache)[0], model(idx)[0])
    held = cache.nbytes
    cache.reset()
    assert (cache.length, cache.nbytes) == (0, held)
    torch.testing.assert_close(model(idx[:, :5], cache=cache)[0], model(idx[:, :5])[0])
    with pytest.raises(ValueError, match="length: got 6; accepted: 0 to 5"):
        cache.truncate(6)


def test_bad_use_is_named() -> None:
    config = build().config
    for wrong in (0, 161):
        with pytest.raises(ValueError, match=f"max_tokens: got {wrong}; accepted: 1 to block_size = 160"):
            KVCache(config, wrong)
    layer = LayerKVCache(8)
    layer.append(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="key: got 6 tokens after 3 cached; accepted: max_tokens = 8"):
        layer.append(torch.zeros(1, 2, 6, 4), torch.zeros(1, 2, 6, 4))
    with pytest.raises(ValueError, match="key: got B, H_kv, D, dtype, device"):
        layer.append(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
    with pytest.raises(ValueError, match=r"value: got .*bfloat16"):
        layer.append(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4, dtype=torch.bfloat16))
    assert layer.length == 3
