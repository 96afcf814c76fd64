"""A training step of GPT-2 124M (T 1024, bf16 autocast, no biases, AdamW, clipping): fastgpt against nanoGPT's way, which is
torch.compile of the same model with torch's SDPA and fused AdamW.

All start from the same weights. Before they are timed, the gradients of a part of the batch are held against float64: relative in the
Euclidean norm, all gradients together.
"""

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.model import GPT, GPTConfig
from fastgpt.train.optimizer import build_optimizer, clip_scale

from ..plain_gpt import PlainGPT, plain_optimizer
from ..variants import Variant
from .kit import Case, Kit, Made

OPTIMIZER: dict[str, Any] = {"learning_rate": 6e-4, "weight_decay": 0.1, "betas": (0.9, 0.95)}
GRAD_CLIP = 1.0
CHECKED = 2  # sequences whose gradients are compared


class Step:
    """A model, its optimizer and a batch; `call` is the model or a compiled form of it."""

    def __init__(self, model: nn.Module, call: Any, batch: tuple[Tensor, Tensor]) -> None:
        self.model, self.call, self.batch = model, call, batch
        self.is_ours = isinstance(model, GPT)
        self.optimizer: Any = (build_optimizer if self.is_ours else plain_optimizer)(model, **OPTIMIZER)

    def loss(self, inputs: Tensor, targets: Tensor, call: Any) -> Tensor:
        options = {"need_logits": False} if self.is_ours else {}
        with torch.autocast(inputs.device.type, torch.bfloat16):
            _, loss = call(inputs, targets, **options)
        found: Tensor = loss
        return found

    def gradients(self) -> Tensor:
        """All gradients of the first sequences in one vector; nothing is changed."""
        inputs, targets = (x[:CHECKED] for x in self.batch)
        self.loss(inputs, targets, self.model).backward()  # uncompiled: the timed shape is not this one
        found = flat(self.model)
        self.model.zero_grad(set_to_none=True)
        return found

    def run(self) -> None:
        """One step; the clipping threshold is looked at on the device where the optimizer can."""
        self.loss(*self.batch, self.call).backward()
        if self.is_ours:
            self.optimizer.step(grad_scale=clip_scale(self.optimizer.grad_norm(), GRAD_CLIP))
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def flat(model: nn.Module) -> Tensor:
    """All gradients in one float32 vector, in the order of the parameters' names."""
    named = sorted(model.named_parameters())
    return torch.cat([p.grad.reshape(-1).float() for _, p in named if p.grad is not None])


def relative_norm(result: Tensor, expected: Tensor) -> float:
    """|result - expected| / |expected| in the Euclidean norm."""
    if result.shape != expected.shape:
        return float("inf")
    error = (torch.linalg.vector_norm(result - expected) / torch.linalg.vector_norm(expected)).item()
    return error if error == error else float("inf")


def train_step(batch: int, small: bool = False) -> Case:
    """The case; `small` is a model of two layers for a machine without a GPU."""
    sizes = (2, 2, 32, 65, 16) if small else (12, 12, 768, 50304, 1024)
    layers, heads, width, vocabulary, time = sizes
    config = GPTConfig(
        vocab_size=vocabulary, block_size=time, n_layer=layers, n_head=heads, n_embd=width, bias=False, activation="gelu"
    )  # fmt: skip

    def make(kit: Kit) -> Made:
        with torch.device("meta" if kit.device.type == "meta" else "cpu"):
            start = GPT(config)
        tokens = kit.below(vocabulary, batch, time + 1)
        data = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

        def plain() -> nn.Module:
            model = PlainGPT(config)
            model.load_state_dict(start.state_dict())
            return model.to(kit.device)

        def variant(name: str, model: nn.Module, call: Any = None) -> Variant:
            step = Step(model, model if call is None else call, data)  # a compiled module has no truth value
            return Variant(name, step.run, ours=step.is_ours, first=step.gradients, optional=True)

        names = ["fastgpt", "torch eager", *(["nanoGPT's way (torch.compile)"] if kit.compiles else [])]
        if kit.device.type == "meta":
            return Made([Variant(name, contextlib.nullcontext) for name in names], tuple)
        variants = [variant(names[0], copy.deepcopy(start).to(kit.device)), variant(names[1], plain())]
        if kit.compiles:
            model = plain()
            variants.append(variant(names[2], model, torch.compile(model, dynamic=False)))

        def expected() -> tuple[Tensor, ...]:
            model = plain().double()
            part = (x[:CHECKED] for x in data)
            model(*part)[1].backward()
            return (flat(model),)

        return Made(variants, expected, error=relative_norm)

    flops = _flops(config, time) * batch * time
    return Case(
        "train_step", "step", "bf16", (layers, width, vocabulary, time, batch), make, flops=flops, tokens=batch * time
    )


def _flops(config: GPTConfig, time: int) -> int:
    with torch.device("meta"):
        return int(GPT(config).flops_per_token(time))
