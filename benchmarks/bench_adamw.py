"""Clipping and one AdamW update of all parameters of a model, against clip_grad_norm_ and torch's fused AdamW; and with zeroing.

The tensors have the shapes of a GPT's parameters: nanoGPT's CPU run, and GPT-2 124M. Bytes: 8 passes over float32, 9 with zeroing. The
gradients are read for their norm; the update reads parameters, gradients and both moments and writes all but the gradients, which it
zeroes where asked. torch's clipping also writes the gradients, and reads them for it once more.
"""

import torch
from torch import Tensor, nn

from fastgpt.model import GPT, GPTConfig
from fastgpt.ops import reference
from fastgpt.train.optimizer import build_optimizer, clip_scale

from .harness import Compare, Variant, ours
from .plain_gpt import plain_optimizer

SIZES = {"full": [(4, 128, 65, 64), (12, 768, 50304, 1024)], "quick": [(2, 32, 65, 16)]}  # layers, width, vocabulary, T
RATE, DECAY, BETAS, EPS, CLIP = 1e-3, 0.1, (0.9, 0.99), 1e-8, 1.0
CHECKED = 8  # parameters compared in float64: the last ones, matrices and norms


def bench_adamw(compare: Compare, size: tuple[int, int, int, int]) -> None:
    layers, width, vocabulary, time = size
    with torch.device("meta"):
        model = GPT(
            GPTConfig(vocab_size=vocabulary, block_size=time, n_layer=layers, n_head=1, n_embd=width, bias=False)
        )
    generator = torch.Generator().manual_seed(0)
    start = [0.02 * torch.randn(p.shape, generator=generator) for p in model.parameters()]
    grads = [1e-2 * torch.randn(p.shape, generator=generator) for p in model.parameters()]
    checked = range(len(start))[-CHECKED:]

    def parameters() -> nn.ParameterList:
        made = nn.ParameterList(p.clone() for p in start)
        for p, g in zip(made, grads, strict=True):
            p.grad = g.clone()  # torch's clipping changes it
        return made

    our_params, torch_params = parameters(), parameters()
    our_optimizer = build_optimizer(our_params, learning_rate=RATE, weight_decay=DECAY, betas=BETAS)
    torch_optimizer = plain_optimizer(torch_params, learning_rate=RATE, weight_decay=DECAY, betas=BETAS)

    def our_step() -> tuple[nn.ParameterList, torch.optim.Optimizer]:
        our_optimizer.step(grad_scale=clip_scale(our_optimizer.grad_norm(), CLIP))
        return our_params, our_optimizer

    def torch_step() -> tuple[nn.ParameterList, torch.optim.Optimizer]:
        nn.utils.clip_grad_norm_(torch_params, CLIP)
        torch_optimizer.step()
        return torch_params, torch_optimizer

    def pick(found: tuple[nn.ParameterList, torch.optim.Optimizer]) -> tuple[Tensor, ...]:
        """What the first step added to the parameters, and both moments."""
        params, optimizer = found
        states = [optimizer.state[params[i]] for i in checked]
        return (
            flat([params[i].detach().double() - start[i].double() for i in checked]),
            flat([state["exp_avg"] for state in states]),
            flat([state["exp_avg_sq"] for state in states]),
        )

    def expected() -> tuple[Tensor, ...]:
        norm = float(sum(g.double().square().sum() for g in grads)) ** 0.5
        p, g = ([values[i].double() for i in checked] for values in (start, grads))
        first, second = ([torch.zeros_like(x) for x in p] for _ in range(2))
        decays = [DECAY if x.dim() >= 2 else 0.0 for x in p]
        reference.adamw(p, g, first, second, decays, RATE, *BETAS, EPS, clip_scale(norm, CLIP), 1)
        return flat([x - start[i].double() for x, i in zip(p, checked, strict=True)]), flat(first), flat(second)

    compare(
        "clip and update", shape=size, dtype="fp32", label=f"{layers} layers, {width} wide:",
        bytes_moved=8 * 4 * sum(p.numel() for p in start), output="preallocated", expected=expected, pick=pick,
        variants=[ours(our_step), Variant("torch fused", torch_step)],
    )  # fmt: skip

    def our_zeroing_step() -> nn.ParameterList:
        our_optimizer.step(grad_scale=clip_scale(our_optimizer.grad_norm(), CLIP), zero_grads=True)
        return our_params

    def torch_zeroing_step() -> nn.ParameterList:
        torch_step()
        torch_optimizer.zero_grad(set_to_none=False)
        return torch_params

    def left(params: nn.ParameterList) -> tuple[Tensor, ...]:
        return (flat([params[i].grad for i in checked]).double(),)

    # Both steps move the same bytes whatever the gradients are, so zeros serve as well from the second call on.
    compare(
        "clip, update and zero", shape=size, dtype="fp32", label=f"{layers} layers, {width} wide:",
        bytes_moved=9 * 4 * sum(p.numel() for p in start), output="preallocated",
        expected=lambda: (torch.zeros(sum(start[i].numel() for i in checked), dtype=torch.float64),),
        pick=left,
        variants=[ours(our_zeroing_step), Variant("torch fused", torch_zeroing_step)],
    )  # fmt: skip


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])
