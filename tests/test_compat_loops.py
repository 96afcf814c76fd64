"""What users' loops do to a model around `fastgpt.accelerate`: another process, transformers' Trainer, a loss of their own, other
families, patched methods, parametrizations, and the ways to generate."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from test_compat import FAMILIES, hugging_face

import fastgpt
from fastgpt.compat import hf

pytestmark = pytest.mark.usefixtures("whatever_size")

LOADER = """
import sys
import torch
model, idx, want = torch.load(sys.argv[1], weights_only=False)
got = model(idx)[0]
torch.testing.assert_close(got, want)
"""


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_a_saved_model_loads_in_another_process(family: str, headless: bool, tmp_path: Path) -> None:
    """There attn_implementation="fastgpt" was not registered yet. GPT-NeoX without its head has parts of torch only."""
    model, idx = hugging_face(family)
    model = model.base_model if headless else model
    fastgpt.accelerate(model.eval())
    with torch.no_grad():
        torch.save((model, idx, model(idx)[0]), tmp_path / "model.pt")
    environment = os.environ | {"PYTHONPATH": str(Path(fastgpt.__file__).parents[1])}
    subprocess.run([sys.executable, "-P", "-c", LOADER, str(tmp_path / "model.pt")], env=environment, check=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_keeps_its_signature(family: str) -> None:
    """transformers' Trainer drops the columns of a data set that are no arguments of it."""
    model, _ = hugging_face(family)
    before = {name: inspect.signature(module.forward) for name, module in model.named_modules() if "act" not in name}
    fastgpt.accelerate(model, fused_loss=True)
    names = {
        name for name, module in model.named_modules() if type(module).__name__ in ("GPT2Block", type(model).__name__)
    }
    assert "" in names
    for name in names:
        assert inspect.signature(model.get_submodule(name).forward) == before[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_loss_of_every_family(family: str) -> None:
    model, idx = hugging_face(family)
    labels = idx.masked_fill(idx < 5, -100)

    def step() -> tuple[Any, list[torch.Tensor]]:
        model.zero_grad()
        out = model(idx, labels=labels)
        out.loss.backward()
        return out.logits, [out.loss.detach(), *(p.grad.clone() for p in model.parameters())]

    want = step()[1]
    fastgpt.accelerate(model, fused_loss=True)
    logits, got = step()
    assert logits is None
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model(idx, labels=labels, logits_to_keep=0).logits, model(idx).logits)


def test_a_loss_that_the_user_sets_later_counts() -> None:
    model, idx = hugging_face("llama")
    fastgpt.accelerate(model, fused_loss=True)
    assert model(idx, labels=idx).logits is None
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    out = model(idx, labels=idx)
    torch.testing.assert_close(out.loss, out.logits.square().mean())
    fastgpt.restore(model)
    torch.testing.assert_close(model(idx, labels=idx).loss, out.loss)


def test_the_fused_loss_and_tuples() -> None:
    model, idx = hugging_face("gpt2")
    model.config.return_dict = False
    try:
        want = model(idx, labels=idx)
    except AttributeError:
        pytest.skip("this version of transformers cannot do it itself")
    fastgpt.accelerate(model, fused_loss=True)
    got = model(idx, labels=idx)
    assert isinstance(got, tuple)
    torch.testing.assert_close(got[:2], want[:2])


def test_a_model_whose_logits_are_more_than_a_product_keeps_its_loss() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "gemma2", **sizes, num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=0.5
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    idx = torch.randint(50, (3, 17))
    want = model(idx, labels=idx).loss
    report = fastgpt.accelerate(model, fused_loss=True)
    torch.testing.assert_close(model(idx, labels=idx).loss, want)
    assert report.left["fused loss of Gemma2ForCausalLM"] == "not a family that is covered"

    class OwnForCausalLM(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.loss = out.loss + 1
            return out

    llama, _ = hugging_face("llama")
    llama.__class__ = OwnForCausalLM
    want = llama(idx, labels=idx).loss
    fastgpt.accelerate(llama, fused_loss=True)
    torch.testing.assert_close(llama(idx, labels=idx).loss, want)


@pytest.mark.parametrize("way", ["forward", "backward_pre_hook"])
def test_a_patched_method_of_a_part_and_its_hooks_are_heeded(way: str) -> None:
    """A forward of its own in an instance is how other libraries move weights in and out."""
    model, idx = hugging_face("gpt2")
    fastgpt.accelerate(model)
    seen = []
    part = model.transformer.h[1].mlp.c_fc
    if way == "forward":
        before = part.forward
        part.forward = lambda x: seen.append(1) or before(x)
    else:
        part.register_full_backward_pre_hook(lambda *_: seen.append(1))
    model(idx).logits.sum().backward()
    assert seen == [1]


def test_restore_leaves_what_was_built_on_our_classes() -> None:
    """A parametrization makes a class of a module's own; without it there is no weight."""

    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.Tanh())
    x = torch.randn(3, 8)
    fastgpt.accelerate(model)
    for part in model[:2]:
        parametrize.register_parametrization(part, "weight", Twice())
    want = model(x)
    assert fastgpt.restore(model) == 1
    torch.testing.assert_close(model(x), want)
    for part in model[:2]:
        parametrize.remove_parametrizations(part, "weight")
    assert fastgpt.restore(model) == 2
    assert [type(part) for part in model] == [torch.nn.LayerNorm, torch.nn.Linear, torch.nn.Tanh]


def test_probabilities_and_head_masks_are_sdpa_s(caplog: pytest.LogCaptureFixture) -> None:
    hf._log_once.cache_clear()
    model, _ = hugging_face("llama")
    x = torch.randn(1, 4, 5, 8)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO", logger="fastgpt"):
        patch.setattr(hf.ops, "attention", None)
        for option in ({"output_attentions": True}, {"head_mask": torch.ones(4)}):
            hf.attention_forward(model.model.layers[0].self_attn, x, x[:, :2], x[:, :2], None, **option)
    assert len([record for record in caplog.records if record.name == "fastgpt"]) == 1


def test_a_transformers_that_is_too_old_keeps_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, idx = hugging_face("llama")
    want = model(idx).logits
    monkeypatch.setattr(hf.importlib.util, "find_spec", lambda name: None)
    report = fastgpt.accelerate(model)
    assert report.left["attention of llama"] == "transformers 4.53 or later is needed"
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(idx).logits, want)


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": 49},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ways_to_generate(family: str, way: str) -> None:
    model, idx = hugging_face(family)
    model.eval()
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **WAYS[way]}
    idx = torch.cat([idx[:1], idx[:1]], 1) if way == "prompt lookup" else idx
    mask = torch.ones_like(idx)
    want = model.generate(idx, attention_mask=mask, **options)
    fastgpt.accelerate(model)
    assert torch.equal(model.generate(idx, attention_mask=mask, **options), want)
