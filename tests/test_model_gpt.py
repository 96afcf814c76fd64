"""GPT against nanoGPT's architecture in plain torch with the same weights: logits, loss, every gradient; and its promises."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from fastgpt.errors import UserError
from fastgpt.model import GPT, GPTConfig


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose a lot to them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ReferenceBlock(torch.nn.Module):
    """nanoGPT's block: torch's LayerNorm, Linear, scaled_dot_product_attention and GELU."""

    def __init__(self, C: int, H: int, bias: bool) -> None:
        super().__init__()
        self.ln_1 = torch.nn.LayerNorm(C, bias=bias)
        self.ln_2 = torch.nn.LayerNorm(C, bias=bias)
        self.c_attn = torch.nn.Linear(C, 3 * C, bias=bias)
        self.attn_proj = torch.nn.Linear(C, C, bias=bias)
        self.c_fc = torch.nn.Linear(C, 4 * C, bias=bias)
        self.mlp_proj = torch.nn.Linear(4 * C, C, bias=bias)
        self.n_head = H

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).split(C, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + self.attn_proj(y)
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class ReferenceGPT(torch.nn.Module):
    """nanoGPT's model, without dropout."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = torch.nn.Embedding(c.block_size, c.n_embd)
        self.h = torch.nn.ModuleList(ReferenceBlock(c.n_embd, c.n_head, c.bias) for _ in range(c.n_layer))
        self.ln_f = torch.nn.LayerNorm(c.n_embd, bias=c.bias)
        self.lm_head = torch.nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def their_name(name: str) -> str:
    """The reference's name of one of GPT's weights."""
    for ours, theirs in (("attn.c_proj", "attn_proj"), ("mlp.c_proj", "mlp_proj"), (".attn.", "."), (".mlp.", ".")):
        name = name.replace(ours, theirs)
    return name


def build(bias: bool = True) -> tuple[GPT, ReferenceGPT, torch.Tensor, torch.Tensor]:
    """A GPT in nanoGPT's parameterisation with random weights everywhere, the reference with the same ones, and a batch."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=97, block_size=48, n_layer=3, n_head=4, n_embd=64, bias=bias, activation="gelu")
    model, reference = GPT(config), ReferenceGPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms away from 0 and 1
            reference.get_parameter(their_name(name)).copy_(parameter)
    idx = torch.randint(97, (20, 48))
    return model, reference, idx, torch.randint(97, (20, 48))


def run(model: torch.nn.Module, names: list[str], idx: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, loss and gradients in fp64."""
    logits, loss = model(idx, targets)
    loss.backward()
    results = {"logits": logits, "loss": loss, **{name: model.get_parameter(name).grad for name in names}}
    return {name: value.detach().double() for name, value in results.items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_parity_with_nanogpt_in_plain_torch(autocast: bool, bias: bool) -> None:
    model, reference, idx, targets = build(bias)
    names = [name for name, _ in model.named_parameters()]
    theirs = [their_name(name) for name in names]
    assert sum(p.numel() for p in reference.parameters()) == model.n_params()
    exact = run(copy.deepcopy(reference).double(), theirs, idx, targets)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, torch_s = run(model, names, idx, targets), run(reference, theirs, idx, targets)
    # What fp32 itself cannot represent; and the loss is one number, a mean over all positions whose rounding errors have random signs,
    # so that torch's own may be next to nothing by luck: it gets a standard error of that mean.
    fp32_eps = torch.finfo(torch.float32).eps
    eps = torch.finfo(torch.bfloat16).eps if autocast else fp32_eps
    for name, value in ours.items():
        want = exact[their_name(name)]
        size = want.norm()
        error, torch_error = (value - want).norm() / size, (torch_s[their_name(name)] - want).norm() / size
        slack = max(fp32_eps, eps / idx.numel() ** 0.5) if name == "loss" else fp32_eps
        assert error <= 2 * torch_error + slack, f"{name}: {error:.2e}, torch {torch_error:.2e}"


def test_grouped_heads_are_a_model_whose_heads_were_copied() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
    grouped, full = GPT(GPTConfig(**shape, n_kv_head=2)), GPT(GPTConfig(**shape))
    weights = grouped.state_dict()
    for name in list(weights):
        if ".c_attn." in name:
            q, k, v = weights[name].split([32, 16, 16])
            k, v = (part.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for part in (k, v))
            weights[name] = torch.cat([q, k, v])
    full.load_state_dict(weights)
    idx = torch.randint(31, (3, 16))
    torch.testing.assert_close(grouped(idx, all_logits=True)[0], full(idx, all_logits=True)[0])


def small(**changes) -> GPT:
    shape = {"vocab_size": 31, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16} | changes
    return GPT(GPTConfig(**shape))


def test_what_forward_returns() -> None:
    model = small()
    idx = torch.randint(31, (3, 10))
    every, none = model(idx, all_logits=True)
    assert every.shape == (3, 10, 31)
    assert none is None
    last, none = model(idx)
    assert none is None
    torch.testing.assert_close(last, every[:, -1:])
    logits, loss = model(idx, idx)
    torch.testing.assert_close(logits, every)
    assert loss.shape == ()


def test_targets_of_minus_100_do_not_count() -> None:
    model = small()
    idx, targets = torch.randint(31, (2, 10)), torch.randint(31, (2, 10))
    masked = targets.clone()
    masked[:, :4] = -100
    logits, loss = model(idx, masked)
    log_p = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert loss.item() == pytest.approx(-log_p[:, 4:].mean().item(), rel=1e-5)


def test_positions_matter_and_the_future_does_not() -> None:
    model = small()
    idx = torch.randint(31, (1, 12))
    changed = idx.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 31
    a, b = model(idx, all_logits=True)[0], model(changed, all_logits=True)[0]
    torch.testing.assert_close(a[:, :8], b[:, :8])
    assert not torch.allclose(a[:, 8:], b[:, 8:])
    same = torch.full((1, 12), 3)
    logits = model(same, all_logits=True)[0]
    assert not torch.allclose(logits[:, 0], logits[:, 5])


def test_dropout_changes_training_only_and_follows_torch_s_seed() -> None:
    model = small(dropout=0.2)
    idx = torch.randint(31, (2, 16))

    def training_logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.train()(idx, all_logits=True)[0]

    assert torch.equal(training_logits(1), training_logits(1))
    assert not torch.equal(training_logits(1), training_logits(2))
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_overfits_one_batch_with_every_activation() -> None:
    for activation in ("relu", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu"):
        torch.manual_seed(0)
        model = small(activation=activation)
        idx, targets = torch.randint(31, (2, 16)), torch.randint(31, (2, 16))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            loss = model(idx, targets)[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.5, activation
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_head_is_the_token_embedding() -> None:
    model = small()
    assert not any("head" in name for name in model.state_dict())
    model(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))[1].backward()
    # Token 1 was never read, only predicted: its row has a gradient through the head alone.
    assert model.wte.weight.grad[1].norm() > 0


def test_compiles_in_one_graph() -> None:
    model = small()
    idx = torch.randint(31, (2, 16))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, loss = compiled(idx, idx)
    want_logits, want_loss = model(idx, idx)
    torch.testing.assert_close(logits, want_logits)
    torch.testing.assert_close(loss, want_loss)


def test_n_params_and_flops() -> None:
    model = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_layer=1, n_head=12, n_embd=768))
    block = 12 * 768 * 768 + 13 * 768
    assert model.n_params() == 50257 * 768 + 1024 * 768 + block + 2 * 768
    assert model.n_params(positions=False) == model.n_params() - 1024 * 768
    matrices = 50257 * 768 + 12 * 768 * 768
    assert model.flops_per_token() == 6 * matrices + 12 * 768 * 1024
    assert model.flops_per_token(10) == 6 * matrices + 12 * 768 * 10


def test_starts_at_the_loss_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    model = small()
    idx = torch.randint(31, (8, 16))
    assert model(idx, torch.randint(31, (8, 16)))[1].item() == pytest.approx(math.log(31), abs=0.05)


@pytest.mark.parametrize(
    ("idx", "targets", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), None, r"idx: got shape \(3,\)"),
        (torch.zeros(2, 0, dtype=torch.int64), None, r"idx: got shape \(2, 0\)"),
        (torch.zeros(2, 17, dtype=torch.int64), None, "idx: got 17 tokens; accepted: at most block_size = 16"),
        (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64), r"targets: got shape \(2, 4\)"),
    ],
)
def test_bad_shapes_are_named(idx: torch.Tensor, targets: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(idx, targets)


def test_a_token_out_of_range_raises() -> None:
    with pytest.raises(IndexError):
        small()(torch.tensor([[31]]))


def test_user_errors_are_value_errors() -> None:
    with pytest.raises(UserError):
        small(n_head=3)
    assert issubclass(UserError, ValueError)
