"""Other people's models before and after `fastgpt.accelerate`: a step of nanoGPT and of transformers' families, and their generate().

Both sides are copies of one model with the same weights, in one run, in turns. A step is forward, backward, clipping and torch's
AdamW: fused on both sides, but for nanoGPT, whose own `configure_optimizers` makes it; "before, fused AdamW" is then torch's faster
one, and "torch.compile" the compiled model with that. "accelerate" is `fastgpt.accelerate(model)`, which still makes the logits;
"accelerate, fused loss" leaves them out. Compared before timing: the first step's gradients with float64 (as in bench_train_step.py),
the first loss with float64's, and for generate() the ids, which must be the same, and the last step's logits. With dropout both are
compared in evaluation mode, since the masks are not torch's, and timed in training.

nanoGPT is nano_gpt.py, its layout in plain torch; sizes are its README's CPU run and its character model, which has a dropout of 0.2
(its batch is 64; 16 take a quarter of the time). Hugging Face's GPT-2 has 0.1 by default.
"""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgpt

from .bench_train_step import FIRST_LOSS, relative_norm
from .harness import Compare, DisagreementError, Variant
from .nano_gpt import GPT, NanoConfig

Size = tuple[str, int, int, int, int, int, int]  # whose, layers, heads, width, vocabulary, T, B
SIZES: dict[str, list[Size]] = {
    "full": [
        ("gpt2", 12, 12, 768, 50257, 256, 4),
        ("gpt2, dropout 0.1", 12, 12, 768, 50257, 256, 4),
        ("nanogpt", 4, 4, 128, 65, 64, 12),
        ("nanogpt", 6, 6, 384, 65, 256, 16),
        ("nanogpt, dropout 0.2", 6, 6, 384, 65, 256, 16),
        ("gpt_neox", 6, 6, 384, 8192, 256, 4),
        ("llama", 6, 6, 384, 8192, 256, 4),
        ("mistral", 6, 6, 384, 8192, 256, 4),
        ("qwen2", 6, 6, 384, 8192, 256, 4),
        ("generate gpt2", 12, 12, 768, 50257, 64, 1),
        ("generate gpt2", 6, 6, 384, 8192, 64, 4),
        ("generate gpt_neox", 6, 6, 384, 8192, 64, 1),
        ("generate llama", 6, 6, 384, 8192, 64, 1),
        ("generate mistral", 6, 6, 384, 8192, 64, 1),
        ("generate qwen2", 6, 6, 384, 8192, 64, 1),
    ],
    "quick": [
        ("gpt2", 1, 2, 16, 65, 16, 2),
        ("nanogpt", 1, 2, 16, 65, 16, 2),
        ("nanogpt, dropout 0.2", 1, 2, 16, 65, 16, 2),
        ("llama", 1, 2, 16, 65, 16, 2),
        ("generate gpt2", 1, 2, 16, 65, 8, 1),
        ("generate gpt_neox", 1, 2, 16, 65, 8, 1),
    ],
}
NEW_TOKENS = {True: 4, False: 64}  # quick or not
LARGE_WIDTH = 384
FUSED = "before, fused AdamW"


def _dropout(size: Size) -> float:
    """What a row's name says, 0 where it says nothing."""
    return float(size[0].partition(", dropout ")[2] or 0.0)


def hugging_face(size: Size) -> Any:
    """A model of transformers, random weights; Llama's kin with two query heads a key head."""
    transformers = pytest.importorskip("transformers")
    whose, layers, heads, width, vocabulary, time, _ = size
    family = whose.removeprefix("generate ").partition(",")[0]
    values: dict[str, Any] = {
        "vocab_size": vocabulary,
        "bos_token_id": None,
        "eos_token_id": None,
        "loss_type": "ForCausalLM",
    }
    positions = max(time + 64, 256)
    if family == "gpt2":
        values |= {"n_positions": positions, "n_embd": width, "n_layer": layers, "n_head": heads}
        values |= dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), _dropout(size))
    else:
        inner = 4 * width if family == "gpt_neox" else 8 * width // 3
        values |= {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
        values |= {"num_attention_heads": heads, "max_position_embeddings": positions, "pad_token_id": 0}
        if family != "gpt_neox":
            values["num_key_value_heads"] = heads // 2
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **values))


class Step:
    """A model, torch's AdamW and one batch."""

    def __init__(
        self, model: nn.Module, idx: Tensor, targets: Tensor, dtype: str, start: dict[str, Tensor], fused: bool = True
    ) -> None:
        self.model, self.idx, self.targets, self.dtype, self.fused = model, idx, targets, dtype, fused
        self.call: Any = model  # or a compiled form of it
        self.start = start  # before any variant has taken a step
        self.restart()

    def restart(self) -> None:
        """The first weights and a new optimizer."""
        self.model.load_state_dict(self.start)
        if self.fused:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        else:
            self.optimizer = self.model.configure_optimizers(0.1, 1e-4, (0.9, 0.99), "cpu")  # type: ignore[operator]

    def loss(self) -> Tensor:
        """The loss, as the model's own users get it."""
        if isinstance(self.model, GPT):
            found: Tensor = self.call(self.idx, self.targets)[1]
            return found
        loss: Tensor = self.model(self.idx, labels=self.idx).loss
        return loss

    def backward(self) -> float:
        """Forward and backward; the loss."""
        half = torch.autocast("cpu", torch.bfloat16) if self.dtype == "bf16" else contextlib.nullcontext()
        with half:
            loss = self.loss()
        loss.backward()
        return loss.item()

    def gradients(self) -> Tensor:
        """All in one vector, by name."""
        return torch.cat([p.grad.reshape(-1) for _, p in sorted(self.model.named_parameters()) if p.grad is not None])

    def __call__(self) -> None:
        self.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def bench_dropin(compare: Compare, size: Size) -> None:
    whose, layers, heads, width, vocabulary, time, batch = size
    torch.manual_seed(0)
    idx, targets = torch.randint(vocabulary, (2, batch, time))
    if whose.startswith("generate"):
        _generate(compare, size, idx)
        return
    dropout, is_nano = _dropout(size), whose.startswith("nanogpt")
    model = (
        GPT(NanoConfig(time, vocabulary, layers, heads, width, dropout, bias=False)) if is_nano else hugging_face(size)
    )
    model.train(not dropout)
    start = copy.deepcopy(model.state_dict())
    wide = Step(copy.deepcopy(model).double(), idx, targets, "fp64", start)
    exact_loss = wide.backward()
    exact = wide.gradients().float()
    del wide
    models = {"before": model, "accelerate": copy.deepcopy(model), "accelerate, fused loss": copy.deepcopy(model)}
    if is_nano:
        models[FUSED] = copy.deepcopy(model)
    fastgpt.accelerate(models["accelerate"])
    fastgpt.accelerate(models["accelerate, fused loss"], fused_loss=True)
    for dtype in ("fp32", "bf16"):
        steps = {
            name: Step(variant, idx, targets, dtype, start, fused=name == FUSED or not is_nano)
            for name, variant in models.items()
        }
        losses: dict[str, float] = {}
        if is_nano and dtype == "bf16" and not dropout and not compare.quick:
            for compiled in compare.compiled(models[FUSED], lambda f: f):
                steps[compiled.name] = Step(models[FUSED], idx, targets, dtype, start)
                steps[compiled.name].call = compiled.run
        compare(
            "step",
            label=f"{whose}, {layers} layers, {width} wide, T {time}, B {batch}:",
            shape=size[1:],
            dtype=dtype,
            tokens=batch * time,
            expected=lambda: (exact,),
            error=relative_norm,
            rounds=(3 if width > LARGE_WIDTH else 5) if width >= LARGE_WIDTH else None,
            variants=[_variant(name, step, losses, bool(dropout)) for name, step in steps.items()],
            extra=lambda losses=losses: {name: {"first_losses": [value]} for name, value in losses.items()},  # type: ignore[misc]
        )
        for name, found in losses.items():
            if not abs(found - exact_loss) <= FIRST_LOSS[dtype] * exact_loss:
                raise DisagreementError(f"{name}: the first loss is {found}, in float64 it is {exact_loss}")


def _variant(name: str, step: Step, losses: dict[str, float], drops: bool) -> Variant:
    def first() -> Tensor:
        step.restart()
        step.model.train(not drops)
        losses[name] = step.backward()
        gradients = step.gradients()
        step.optimizer.zero_grad(set_to_none=True)
        step.model.train()
        return gradients

    return Variant(name, step, ours="accelerate" in name, optional=name == "torch.compile", first=first)


def _generate(compare: Compare, size: Size, idx: Tensor) -> None:
    """Greedy generate() with a cache, the whole call."""
    whose, layers, _, width, _, time, batch = size
    model = hugging_face(size).eval()
    new = NEW_TOKENS[compare.quick]
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(idx), "return_dict_in_generate": True, "output_logits": True}
    models = {"before": model, "accelerate": copy.deepcopy(model)}
    fastgpt.accelerate(models["accelerate"])
    ids = model.generate(idx, **options).sequences

    def run(name: str) -> Tensor:
        out = models[name].generate(idx, **options)
        if not torch.equal(out.sequences, ids):
            raise DisagreementError(f"{name}: other ids than before")
        last: Tensor = out.logits[-1]
        return last

    def expected() -> tuple[Tensor]:
        with torch.no_grad():
            return (copy.deepcopy(model).double()(ids[:, :-1]).logits[:, -1],)

    compare(
        "generate",
        label=f"{whose.removeprefix('generate ')}, {layers} layers, {width} wide, prompt {time}, B {batch}, {new} new:",
        shape=size[1:],
        dtype="fp32",
        tokens=new * batch,
        expected=expected,
        rounds=5 if width > LARGE_WIDTH else None,
        variants=[Variant(name, lambda name=name: run(name), ours=name != "before") for name in models],  # type: ignore[misc]
    )
