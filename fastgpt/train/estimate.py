"""What a run will take, before it starts: parameters, memory, floating-point operations, time. `fastgpt train --dry-run` prints it.

Memory of a training step, in bytes, N parameters:

    weights 4 N, gradients 4 N, AdamW's two moments 8 N        all float32
    activations                                                what autograd keeps for the backward pass, counted on the model
                                                               itself with tensors that have shapes and no memory

What is not in it: temporary buffers inside an op, the allocator's rounding, bfloat16 copies of weights under autocast (up to 2 N), the
runtime itself. Expect the process to be larger.

Operations are `GPT.flops_per_token`. The time of a step is measured on this machine with random tokens where a step is short and fits
into the memory; where it is not, it is computed from the rate of one matrix product measured here, at ASSUMED_SHARE of it.
"""

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt.model import GPT, GPTConfig
from fastgpt.train.evaluate import autocast
from fastgpt.train.optimizer import build_optimizer

ASSUMED_SHARE = 0.4  # of a matrix product's rate, for a whole step
MEASURED_STEPS = 2
LONGEST_MEASURED_S = 8.0
PLAN_FLOPS = 989e12  # bfloat16 operations a second of the accelerator that the planning table is for


@dataclass(frozen=True)
class Estimate:
    """What a model takes; bytes and operations.

    Attributes:
        n_params: parameters.
        flops_per_token: forward and backward.
        weight_bytes: weights in float32.
        gradient_bytes: the same again.
        moment_bytes: AdamW's state.
        activation_bytes: kept for the backward pass of one forward pass of batch_size sequences.
    """

    n_params: int
    flops_per_token: int
    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int
    activation_bytes: int

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and moments."""
        return self.weight_bytes + self.gradient_bytes + self.moment_bytes

    @property
    def total_bytes(self) -> int:
        """All of it, on one device."""
        return self.state_bytes + self.activation_bytes


def activation_bytes(config: GPTConfig, batch_size: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps between forward and backward pass, each piece of memory once, parameters and tokens not counted.

    Args:
        config: the model.
        batch_size: sequences of block_size tokens.
        dtype: torch.float32, or torch.bfloat16 for autocast.

    Example:
        >>> config = GPTConfig(vocab_size=65, block_size=64, n_layer=2, n_head=2, n_embd=16)
        >>> 2 * activation_bytes(config, 4, torch.float32) == activation_bytes(config, 8, torch.float32)
        True
    """
    kept: dict[int, int] = {}
    own: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    with torch.device("meta"):
        model = GPT(config)
    with FakeTensorMode():
        weights = {name: torch.empty(p.shape, requires_grad=True) for name, p in model.named_parameters()}
        idx = torch.zeros(batch_size, config.block_size, dtype=torch.int64)
        own = {p.untyped_storage()._cdata for p in weights.values()} | {idx.untyped_storage()._cdata}
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            autocast(torch.device("cpu"), dtype),
        ):
            torch.func.functional_call(model, weights, (idx, idx), {"need_logits": False})
    return sum(kept.values())


def checkpointed_bytes(config: GPTConfig, batch_size: int, dtype: torch.dtype) -> int:
    """The same with activation checkpointing, at its highest: every block's input, and what one block and the head keep.

    Args:
        config, batch_size, dtype: as `activation_bytes`.

    Example:
        >>> config = GPTConfig(vocab_size=65, block_size=64, n_layer=8, n_head=2, n_embd=16)
        >>> checkpointed_bytes(config, 4, torch.float32) < activation_bytes(config, 4, torch.float32) / 3
        True
    """
    inputs = (config.n_layer - 1) * batch_size * config.block_size * config.n_embd * 4  # the residual stream is float32
    return inputs + activation_bytes(dataclasses.replace(config, n_layer=1), batch_size, dtype)


def estimate(config: GPTConfig, batch_size: int, dtype: torch.dtype) -> Estimate:
    """What training a model takes on one device.

    Args:
        config: the model.
        batch_size: sequences in one forward pass.
        dtype: torch.float32 or torch.bfloat16 (autocast).

    Example:
        >>> config = GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
        >>> estimate(config, 1, torch.bfloat16).n_params
        124439808
    """
    with torch.device("meta"):
        model = GPT(config)
    n = model.n_params()
    return Estimate(n, model.flops_per_token(), 4 * n, 4 * n, 8 * n, activation_bytes(config, batch_size, dtype))


@dataclass(frozen=True)
class Share:
    """What one of several processes holds and sends.

    Attributes:
        state_bytes: its weights, gradients and moments.
        gathered_bytes: fsdp: whole weights and gradients of what it computes just then.
        sent_bytes: what it sends, and receives, in a step.
    """

    state_bytes: int
    gathered_bytes: int
    sent_bytes: int


def share_of(config: GPTConfig, world_size: int, parallel: str) -> Share:
    """One process's part of a job.

    With ddp everything is on each, and gradients go round once (a ring's all-reduce: 2 (N - 1) / N of their bytes). With fsdp the state
    is divided; the weights of the embeddings and of two blocks are whole at a time (the second one is on its way), and their gradients
    until they are divided. Weights are gathered for the forward and the backward pass and gradients divided: three times (N - 1) / N.

    Args:
        config: the model.
        world_size: how many processes.
        parallel: "ddp" or "fsdp".

    Example:
        >>> config = GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
        >>> share_of(config, 8, "ddp").state_bytes // share_of(config, 8, "fsdp").state_bytes
        8
    """
    with torch.device("meta"):
        model = GPT(config)
    n, block = model.n_params(), sum(p.numel() for p in model.h[0].parameters())
    if parallel == "ddp" or world_size == 1:
        return Share(16 * n, 0, 4 * n * 2 * (world_size - 1) // world_size)
    outside = n - config.n_layer * block
    gathered = 4 * (outside + 2 * block) + 4 * (outside + block)
    return Share(-(-16 * n // world_size), gathered, 4 * n * 3 * (world_size - 1) // world_size)


def matmul_flops(n_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of (n_rows, width) @ (width, 4 width), the best of a few."""
    x = torch.randn(n_rows, width, dtype=dtype, device=device)
    weight = torch.randn(width, 4 * width, dtype=dtype, device=device)
    best, deadline = float("inf"), time.perf_counter() + 1.0
    for _ in range(20):
        started = time.perf_counter()
        x @ weight
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() > deadline:
            break
    return 2 * n_rows * width * 4 * width / best


def measure_step_s(
    config: GPTConfig, batch_size: int, grad_accum_steps: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Seconds of an optimizer step, the median of MEASURED_STEPS after one to warm up, on random tokens."""
    model = GPT(config).to(device)
    optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95))
    idx = torch.randint(config.vocab_size, (batch_size, config.block_size), device=device)
    times = []
    for _ in range(1 + MEASURED_STEPS):
        started = time.perf_counter()
        for _ in range(grad_accum_steps):
            with autocast(device, dtype):
                _, loss = model(idx, idx, need_logits=False)
            loss.backward()
        optimizer.grad_norm()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[len(times[1:]) // 2]


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 2**62


def count(value: float) -> str:
    """A number with three digits and a unit: 124 M.

    >>> count(124439808), count(1.5576e9), count(855e6)
    ('124 M', '1.56 G', '855 M')
    """
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


def duration(seconds: float) -> str:
    """Seconds in the unit that suits: 3.2 days."""
    for unit, size in (("years", 365.25 * 86400.0), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def report(
    config: GPTConfig,
    options: Any,
    dtype: torch.dtype,
    device: torch.device,
    max_steps: int | None,
    world_size: int = 1,
) -> Iterable[str]:
    """The lines that `--dry-run` prints.

    Args:
        config: the model.
        options: the section `train` of a configuration.
        dtype, device: what the run would use.
        max_steps: the length, None where it is not known.
        world_size: how many processes, each on a device like this one.
    """
    B, accum = options.batch_size // world_size, options.grad_accum_steps
    found = estimate(config, B, dtype)
    if options.activation_checkpointing:
        found = dataclasses.replace(found, activation_bytes=checkpointed_bytes(config, B, dtype))
    tokens = B * accum * config.block_size
    yield f"parameters: {found.n_params:,}"
    yield f"operations: {count(found.flops_per_token)}FLOP a token, {count(found.flops_per_token * tokens * world_size)}FLOP a step"
    share = share_of(config, world_size, options.parallel)
    total = share.state_bytes + share.gathered_bytes + found.activation_bytes
    if world_size == 1:
        parts = f"weights {count(found.weight_bytes)}B, gradients {count(found.gradient_bytes)}B, moments {count(found.moment_bytes)}B"
        whose = "memory"
    else:
        parts = f"weights, gradients and moments {count(share.state_bytes)}B"
        parts += f", gathered {count(share.gathered_bytes)}B" if share.gathered_bytes else ""
        whose = f"memory of each of {world_size} processes ({options.parallel})"
    yield (
        f"{whose}: {count(total)}B ({parts}, activations {count(found.activation_bytes)}B for {B} x {config.block_size} tokens), "
        f"buffers and the runtime not counted; {count(free_bytes(device))}B free on {device}"
    )
    rate = matmul_flops(min(B * config.block_size, 4096), config.n_embd, dtype, device)
    step_s = found.flops_per_token * tokens / (rate * ASSUMED_SHARE)
    how = f"computed at {ASSUMED_SHARE:.0%} of the {count(rate)}FLOP/s of a matrix product here"
    fits = total + 2 * found.n_params < 0.8 * free_bytes(device)
    if not fits:
        yield f"this does not fit into the memory of {device}; a smaller train.batch_size takes less for activations"
    elif step_s / accum * (1 + MEASURED_STEPS) < LONGEST_MEASURED_S:
        step_s = measure_step_s(config, B, 1, dtype, device) * accum
        how = f"measured on {device}"
    if world_size > 1:
        how += f" for one process's {tokens:,} tokens, each with a device like this one to itself"
    tokens *= world_size
    yield f"a step: {tokens:,} tokens, {duration(step_s)} ({how}), {tokens / step_s:,.0f} tokens/s"
    if world_size > 1:
        yield f"between processes: each sends {count(share.sent_bytes)}B a step, which the times leave out"
    if max_steps is not None:
        yield f"the run: {max_steps:,} steps, {max_steps * tokens:,} tokens, {duration(max_steps * step_s)} without evaluations"
    elif options.time_budget_s is not None:
        yield f"the run: {duration(options.time_budget_s)}, about {int(options.time_budget_s / step_s):,} steps"


def plan_rows(presets: Iterable[str], world_sizes: Iterable[int]) -> list[str]:
    """The planning table of docs/scale.md as Markdown: computed, nothing in it is measured.

    Memory a GPU: DDP keeps the whole state on each, sharding divides it. Time: the operations of 20 tokens a parameter (Hoffmann
    et al., arXiv 2203.15556) at ASSUMED_SHARE of PLAN_FLOPS.
    """
    from fastgpt.train.config import load_config
    from fastgpt.train.run import model_config

    rows = [
        "| preset | parameters | FLOP a token | GPUs | batch a GPU | activations a GPU | memory a GPU, DDP | memory a GPU, sharded "
        "| the same, checkpointed | tokens/s | time of 20 tokens a parameter |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for preset in presets:
        config = load_config(preset=preset)
        B = config.train.batch_size
        shape = model_config(config, 50257)
        found, least = estimate(shape, B, torch.bfloat16), checkpointed_bytes(shape, B, torch.bfloat16)
        for world in world_sizes:
            share = found.activation_bytes
            ddp, sharded = found.state_bytes + share, found.state_bytes // world + share
            checkpointed = found.state_bytes // world + least
            speed = PLAN_FLOPS * ASSUMED_SHARE * world / found.flops_per_token
            rows.append(
                f"| {preset} | {count(found.n_params)} | {count(found.flops_per_token)} | {world} | {B} x 1024 | {share / 1e9:.1f} GB "
                f"| {ddp / 1e9:.1f} GB | {sharded / 1e9:.1f} GB | {checkpointed / 1e9:.1f} GB | {count(speed).strip()} "
                f"| {duration(20 * found.n_params / speed)} |"
            )
    return rows
