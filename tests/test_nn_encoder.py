"""fastgpt.nn's MultiheadAttention, TransformerEncoderLayer, Linear and LinearCrossEntropyLoss against torch's own classes."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastgpt
from fastgpt import nn
from fastgpt.nn import encoder, fallback, linear
from fastgpt.ops.backend import engine_of


def both(name: str, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """(ours, torch's) of one seed: the initial weights are the same without being copied."""
    made = []
    for space in (nn, torch.nn):
        torch.manual_seed(0)
        made.append(getattr(space, name)(*arguments, **options))
    for mine, theirs in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert list(made[0].state_dict()) == list(made[1].state_dict())
    return made[0], made[1]


def errors(module: Any, call: Any, exact: list[torch.Tensor] | None = None) -> list[Any]:
    """The result and all gradients in float64, or their errors relative to `exact`."""
    leaves, y = call(module)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    found = [y.detach(), *(x.grad for x in leaves), *(p.grad for p in module.parameters() if p.grad is not None)]
    if exact is None:
        return [x.double() for x in found]
    return [
        float((x.double() - want).norm() / want.norm().clamp_min(1e-6)) for x, want in zip(found, exact, strict=True)
    ]


def assert_as_close(pair: tuple[Any, Any], call: Any, dtype: torch.dtype) -> None:
    ours, theirs = (module.to(dtype) for module in pair)
    exact = errors(copy.deepcopy(theirs).double(), lambda module: call(module, torch.float64))
    mine = errors(ours, lambda module: call(module, dtype), exact)
    torchs = errors(theirs, lambda module: call(module, dtype), exact)
    for i, (error, limit) in enumerate(zip(mine, torchs, strict=True)):
        assert error <= 2 * limit + torch.finfo(torch.float32).eps, f"{i}: {error:.2e}, torch's {limit:.2e}"


def inputs(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.fixture
def attends(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry a call of our attention."""
    calls: list[bool] = []

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(True)
        return original(*args, **kwargs)

    original = encoder.scaled_dot_product_attention
    monkeypatch.setitem(fallback.SMALLEST, "layer", 0)
    monkeypatch.setattr(encoder, "scaled_dot_product_attention", watched)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"batch_first": True}, [(3, 9, 32)]),
        ({}, [(9, 3, 32)]),
        ({"bias": False}, [(9, 32)]),
        ({"batch_first": True}, [(3, 5, 32), (3, 9, 32), (3, 9, 32)]),
        ({"batch_first": True, "kdim": 16, "vdim": 24}, [(3, 5, 32), (3, 9, 16), (3, 9, 24)]),
    ],
    ids=["self", "time first", "unbatched", "cross", "other widths"],
)
@pytest.mark.parametrize("causal", [False, True])
def test_multihead_attention(
    causal: bool, options: dict[str, Any], shapes: list[tuple[int, ...]], dtype: torch.dtype, attends: list[bool]
) -> None:
    def call(module: Any, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
        leaves = inputs(dtype, *shapes)
        arguments = leaves * 3 if len(leaves) == 1 else leaves
        sizes = [x.shape[1 if x.dim() == 3 and options.get("batch_first") else 0] for x in arguments[:2]]
        mask = torch.ones(*sizes, dtype=torch.bool).triu(1) if causal else None
        y, weights = module(*arguments, need_weights=False, attn_mask=mask, is_causal=causal)
        assert weights is None
        return leaves, y

    assert_as_close(both("MultiheadAttention", 32, 4, **options), call, dtype)
    assert len(attends) == 1


def test_what_attention_lacks_is_torch_s(attends: list[bool]) -> None:
    ours, theirs = both("MultiheadAttention", 32, 4, batch_first=True)
    (x,) = inputs(torch.float32, (3, 9, 32))
    padding = torch.zeros(3, 9, dtype=torch.bool)
    padding[0, :4] = True
    for options in (
        {},
        {"average_attn_weights": False},
        {"need_weights": False, "key_padding_mask": padding},
        {"need_weights": False, "attn_mask": torch.randn(9, 9)},
    ):
        torch.testing.assert_close(ours(x, x, x, **options), theirs(x, x, x, **options), rtol=0, atol=0)
    assert not attends
    for wrong in ((x, x, x[:, :4]), (x, x[:2], x[:2]), (x[..., :16], x, x), (x, x[0], x[0])):
        for module in (ours, theirs):
            with pytest.raises((RuntimeError, AssertionError)):
                module(*wrong, need_weights=False)
    with pytest.raises(RuntimeError, match="attn_mask"):
        ours(x, x, x, need_weights=False, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer(
    norm_first: bool, activation: str, causal: bool, dtype: torch.dtype, attends: list[bool]
) -> None:
    def call(module: Any, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
        leaves = inputs(dtype, (3, 9, 32))
        mask = torch.nn.Transformer.generate_square_subsequent_mask(9, dtype=dtype) if causal else None
        return leaves, module(leaves[0], src_mask=mask, is_causal=causal)

    options = {"dropout": 0.0, "activation": activation, "norm_first": norm_first, "batch_first": True}
    pair = both("TransformerEncoderLayer", 32, 4, 48, **options)
    assert_as_close(pair, call, dtype)
    assert len(attends) == 1
    models = [module.to(dtype).eval() for module in pair]  # torch's has a kernel of its own for this
    with torch.no_grad():
        exact = call(copy.deepcopy(models[1]).double(), torch.float64)[1]
        mine, torchs = (float((call(module, dtype)[1].double() - exact).norm() / exact.norm()) for module in models)
    assert mine <= 2 * torchs + torch.finfo(torch.float32).eps


def test_attention_with_dropout_is_ours(attends: list[bool]) -> None:
    ours, _ = both("MultiheadAttention", 32, 4, dropout=0.5, batch_first=True)
    (x,) = inputs(torch.float32, (1, 9, 32))

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        found: torch.Tensor = ours(x, x, x, need_weights=False)[0]
        return found.detach()

    assert torch.equal(run(1), run(1))
    many = torch.stack([run(seed) for seed in range(500)])
    assert len(attends) == 502
    ours.eval()
    assert torch.equal(run(1), run(2))
    assert (many.std(0) > 0).all()
    assert ((many.mean(0) - run(0)).abs() < 6 * many.std(0) / 500**0.5).all()
    model = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.5)
    kept = fastgpt.accelerate(copy.deepcopy(model), keep_dropout=True)
    assert not {"TransformerEncoderLayer", "MultiheadAttention", "Dropout"} & set(kept.replaced)
    assert "torch's" in kept.left["MultiheadAttention"]
    assert {"TransformerEncoderLayer", "Dropout"} <= set(fastgpt.accelerate(model).replaced)


def test_encoder_layer_with_dropout_padding_copies_and_stacks() -> None:
    ours, theirs = both("TransformerEncoderLayer", 32, 4, 48, dropout=0.2, batch_first=True)
    assert isinstance(ours.self_attn, nn.MultiheadAttention)
    (x,) = inputs(torch.float32, (3, 9, 32))
    padding = torch.zeros(3, 9, dtype=torch.bool)
    padding[0, 6:] = True
    results = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        results.append(module(x, src_key_padding_mask=padding))
    torch.testing.assert_close(*results)
    assert not torch.equal(ours(x), ours(x))
    for module in (ours, theirs):
        for part in (module.dropout, module.dropout1, module.dropout2):
            part.p = 1.0
    torch.testing.assert_close(ours(x), theirs(x))
    stacks = [torch.nn.TransformerEncoder(copy.deepcopy(module), 2).eval() for module in (ours, theirs)]
    torch.testing.assert_close(stacks[0](x), stacks[1](x))
    with torch.no_grad():
        torch.testing.assert_close(
            stacks[0](x, src_key_padding_mask=padding)[~padding], stacks[1](x, src_key_padding_mask=padding)[~padding]
        )
    compiled = torch.compile(ours.eval(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ours(x))


def test_one_thread_leaves_more_weights_to_torch() -> None:
    weight, before = torch.empty(1024, 1024), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert not fallback.is_small_weight(weight)
        torch.set_num_threads(1)
        assert fallback.is_small_weight(weight)
        assert not fallback.is_small_weight(weight.expand(9, 1024, 1024))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(engine_of("linear")[0] != "cpu", reason="a few rows are taken only where the CPU engine runs")
def test_linear_takes_a_few_rows_itself_and_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = both("Linear", 32, 7)
    for limit in ("weight", "weight, one thread"):
        monkeypatch.setitem(fallback.SMALLEST, limit, 0)
    x = torch.randn(8, 32)
    want, wants = theirs(x), theirs(x.repeat(2, 1))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), want)
        torch.testing.assert_close(ours(x.repeat(2, 1)), wants)
        monkeypatch.setattr(linear, "ops", None)
        with pytest.raises(AttributeError):
            ours(x)
        assert torch.equal(ours(x.repeat(2, 1)), wants)
    assert torch.equal(ours(x), want)  # gradients are wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum", "label_smoothing": 0.1}, {"ignore_index": 3}, {"bias": True}], ids=str
)
def test_linear_cross_entropy_loss(options: dict[str, Any], dtype: torch.dtype) -> None:
    target = torch.randint(11, (20,), generator=torch.Generator().manual_seed(4))

    class Parts(torch.nn.Module):
        """The two modules it stands for: torch's own class is in its newest versions only."""

        def __init__(self, bias: bool = False, **rest: Any) -> None:
            super().__init__()
            self.linear, self.loss = torch.nn.Linear(16, 11, bias=bias), torch.nn.CrossEntropyLoss(**rest)

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self.loss(self.linear(x), target)

    def call(module: Any, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
        leaves = inputs(dtype, (20, 16))
        return leaves, module(leaves[0], target).to(dtype)

    torch.manual_seed(0)
    ours, theirs = nn.LinearCrossEntropyLoss(16, 11, **options), Parts(**options)
    theirs.load_state_dict(ours.state_dict())
    assert_as_close((ours, theirs), call, dtype)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch has no LinearCrossEntropyLoss")
def test_linear_cross_entropy_loss_is_torch_s() -> None:
    (x,) = inputs(torch.float32, (6, 16))
    target = torch.tensor([0, 1, 2, 3, 4, -100])
    for options, wanted in (
        ({}, target),
        ({"ignore_index": 4}, target.clamp_min(0)),
        ({"reduction": "none"}, target),
        ({"out_features": (2,)}, target[:, None].expand(6, 2)),
        ({"weight": torch.rand(5), "bias": True}, target),
        ({}, torch.full((6, 5), 0.2)),
    ):
        ours, theirs = both("LinearCrossEntropyLoss", 16, 5, **options)
        torch.testing.assert_close(ours(x, wanted), theirs(x, wanted))
    ours, theirs = both("LinearCrossEntropyLoss", 16, 5)
    torch.testing.assert_close(ours(x[0], target[0]), theirs(x[0], target[0]))
    for module in (ours, theirs):
        with pytest.raises(RuntimeError):
            module(x[:, :8], target)
        with pytest.raises((ValueError, RuntimeError)):
            module(x, target[:3])
    with pytest.raises(RuntimeError, match="label_smoothing"):
        nn.LinearCrossEntropyLoss(4, 4, label_smoothing=2.0)


def test_encoder_layer_s_gelu_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, activation=F.gelu, batch_first=True)
    x = torch.zeros(1, 2, 32)
    with monkeypatch.context() as small:  # torch's: Python around our ops would cost more than they save
        small.setattr(encoder, "ops", None)
        layer(x)
    monkeypatch.setitem(fallback.SMALLEST, "layer", 0)
    monkeypatch.setattr(encoder, "ops", None)
    with pytest.raises(AttributeError):
        layer(x)
