"""One training step of fastgpt's GPT against the same model in plain torch (plain_gpt.py): forward, backward, clipping, AdamW.

Configurations: nanoGPT's own CPU run (4 layers, 128 wide), its character model for GPUs (6 layers, 384 wide) and GPT-2 124M at T 256;
no biases, as nanoGPT trains them, and no dropout. Precisions: fp32, fp32 with torch.set_float32_matmul_precision("medium") and
bf16 autocast. "medium" allows products of numbers rounded to bf16: ours makes use of that, and is held to bf16's limits; torch on a CPU
without AMX takes another library for the products and stays exact.

Both models start from the same weights and see the same random tokens. Before they are timed, the first step's gradients are compared
with float64 (the error is relative in the Euclidean norm, over all gradients together), the first loss must be float64's, and the
losses of the first steps must be torch eager's; they are recorded. A loss is one number, right or wrong by luck in its last digits, so
it has a limit of its own and not twice torch's error. torch.compile of the largest model is timed in bf16 only: compiling it takes most
of a minute.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt.model import GPT, GPTConfig
from fastgpt.train.optimizer import build_optimizer, clip_scale

from .harness import Compare, DisagreementError, Variant
from .plain_gpt import PlainGPT, plain_optimizer

Size = tuple[int, int, int, int, int, int]  # layers, heads, width, vocabulary, T, B
SIZES: dict[str, list[Size]] = {
    "full": [(4, 4, 128, 65, 64, 12), (6, 6, 384, 65, 256, 16), (12, 12, 768, 50304, 256, 4)],
    "quick": [(2, 2, 32, 65, 16, 2)],
}
PRECISIONS = (("fp32", "highest"), ("fp32", "medium"), ("bf16", "highest"))  # dtype, torch's float32 matmul precision
OPTIMIZER: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.99)}
GRAD_CLIP = 1.0
FIRST_STEPS = 3
FIRST_LOSS = {"fp32": 1e-5, "bf16": 1e-3}  # relative to float64's
SAME_LOSS = {
    "fp32": 1e-3,
    "bf16": 1e-2,
}  # relative; updates of AdamW turn tiny differences of tiny gradients into whole steps
LARGE = 10**8  # parameters: two first steps, three rounds, no torch.compile in fp32


class Training:
    """A model, its optimizer and one batch; `call` is the model or a compiled form of it."""

    def __init__(self, model: nn.Module, dtype: str, batch: tuple[Tensor, Tensor], start: dict[str, Tensor]) -> None:
        self.model, self.call, self.dtype, self.batch, self.start = model, model, dtype, batch, start
        self.is_ours = isinstance(model, GPT)
        self.options = {"need_logits": False} if self.is_ours else {}
        self.make_optimizer: Callable[..., Any] = build_optimizer if self.is_ours else plain_optimizer
        self.optimizer: Any = self.make_optimizer(model, **OPTIMIZER)

    def loss_and_gradients(self) -> Tensor:
        """The loss; gradients are left in the parameters."""
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.dtype == "bf16":
            context = torch.autocast("cpu", torch.bfloat16)
        with context:
            _, loss = self.call(*self.batch, **self.options)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Clip, step and drop the gradients, as each library does it."""
        if self.is_ours:
            self.optimizer.step(grad_scale=clip_scale(self.optimizer.grad_norm(), GRAD_CLIP))
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> float:
        """One training step; the loss."""
        loss = self.loss_and_gradients()
        self.update()
        return loss.item()

    def first_steps(self, count: int) -> tuple[Tensor, list[float]]:
        """From the starting weights: all first gradients in one vector, and the losses of `count` steps."""
        self.model.load_state_dict(self.start)
        self.optimizer = self.make_optimizer(self.model, **OPTIMIZER)
        loss = self.loss_and_gradients()
        gradients = flat_gradients(self.model)
        self.update()
        return gradients, [loss.item(), *(self.step() for _ in range(count - 1))]


def flat_gradients(model: nn.Module) -> Tensor:
    """All gradients in one vector, in the order of the parameters' names."""
    named = sorted(model.named_parameters())
    return torch.cat([p.grad.reshape(-1) for _, p in named if p.grad is not None])


def relative_norm(result: Tensor, expected: Tensor) -> float:
    """|result - expected| / |expected| in the Euclidean norm, a slice at a time: float64 copies of all gradients are gigabytes."""
    if result.shape != expected.shape:
        return float("inf")
    squares = [
        ((r.double() - e.double()).square().sum(), e.double().square().sum())
        for r, e in zip(result.reshape(-1).split(2**22), expected.reshape(-1).split(2**22), strict=True)
    ]
    difference, size = (float(sum(part)) for part in zip(*squares, strict=True))
    error = (difference / size) ** 0.5
    return error if error == error else float("inf")


def bench_train_step(compare: Compare, size: Size, request: pytest.FixtureRequest) -> None:
    layers, heads, width, vocabulary, time, batch = size
    config = GPTConfig(
        vocab_size=vocabulary,
        block_size=time,
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        bias=False,
        activation="gelu",
    )
    torch.manual_seed(0)
    our_model, plain_model = GPT(config), PlainGPT(config)
    start = copy.deepcopy(our_model.state_dict())
    plain_model.load_state_dict(start)
    tokens = torch.randint(vocabulary, (batch, time + 1), generator=torch.Generator().manual_seed(1))
    data = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    large = our_model.n_params() > LARGE
    count = 2 if large else FIRST_STEPS
    exact_loss, exact_gradients = exact(plain_model, data)

    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    for dtype, products in PRECISIONS:
        losses: dict[str, list[float]] = {}
        trainings = {
            "fastgpt": Training(our_model, dtype, data, start),
            "torch eager": Training(plain_model, dtype, data, start),
        }
        if dtype == "bf16" or (products == "medium" and not large):
            compiled = Training(plain_model, dtype, data, start)
            for variant in compare.compiled(plain_model, lambda f: f):
                compiled.call = variant.run  # type: ignore[assignment]
                trainings[variant.name] = compiled
        compare(
            "step" if products == "highest" else f"step, products {products},",
            label=f"{layers} layers, {width} wide, T {time}, B {batch}:",
            shape=size,
            dtype=dtype,
            tokens=batch * time,
            flops=our_model.flops_per_token(time) * batch * time,
            expected=lambda: (exact_gradients,),
            error=relative_norm,
            rounds=3 if large else 5 if width > 128 else None,
            variants=[_variant(name, training, products, losses, count) for name, training in trainings.items()],
            extra=lambda losses=losses: {name: {"first_losses": values} for name, values in losses.items()},  # type: ignore[misc]
        )
        _same_losses(losses, exact_loss, dtype if products == "highest" else "bf16")


def exact(model: PlainGPT, data: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
    """The loss and all gradients at the model's weights in float64; gradients are kept in float32."""
    wide = copy.deepcopy(model).double()
    _, loss = wide(*data)
    loss.backward()
    return loss.item(), torch.cat([p.grad.reshape(-1).float() for _, p in sorted(wide.named_parameters())])  # type: ignore[union-attr]


def _variant(name: str, training: Training, products: str, losses: dict[str, list[float]], count: int) -> Variant:
    def first() -> Tensor:
        gradients, losses[name] = training.first_steps(count)
        return gradients

    return Variant(
        name,
        training.step,
        ours=training.is_ours,
        before=lambda: torch.set_float32_matmul_precision(products),
        optional=name == "torch.compile",
        first=first,
        halves=training.is_ours and products == "medium",
    )


def _same_losses(losses: dict[str, list[float]], exact_loss: float, dtype: str) -> None:
    base = losses["torch eager"]
    for name, found in losses.items():
        if not abs(found[0] - exact_loss) <= FIRST_LOSS[dtype] * exact_loss:
            raise DisagreementError(f"{name}: the first loss is {found[0]}, in float64 it is {exact_loss}")
        worst = max(abs(a - b) / b for a, b in zip(found, base, strict=True))
        if not worst <= SAME_LOSS[dtype]:
            raise DisagreementError(f"{name}: losses {found} of the first steps, torch eager's are {base}")
