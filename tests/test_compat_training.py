"""Models of transformers in their users' loops after `fastgpt.accelerate`: gradient checkpointing, torch.compile, autocast, evaluation,
attentions asked for, and two processes under DistributedDataParallel."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compat import FAMILIES, hugging_face

import fastgpt

pytestmark = pytest.mark.usefixtures("whatever_size")


def step(model: Any, idx: torch.Tensor) -> list[torch.Tensor]:
    """The loss and the gradients."""
    model.zero_grad()
    loss = model(idx, labels=idx).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family: str) -> None:
    model, idx = hugging_face(family)
    model.train()
    want = step(model, idx)
    fastgpt.accelerate(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.testing.assert_close(step(model, idx), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_modes_copies_and_the_compiler(family: str) -> None:
    model, idx = hugging_face(family)
    model.eval()
    with torch.no_grad():
        want = model(idx).logits
        fastgpt.accelerate(model)
        torch.testing.assert_close(model(idx).logits, want, rtol=1e-4, atol=1e-5)
        loaded = copy.deepcopy(model)
        loaded.load_state_dict(model.state_dict())
        assert torch.equal(loaded(idx).logits, model(idx).logits)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(idx).logits.detach(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attentions_that_are_asked_for_come_from_the_original(family: str) -> None:
    model, idx = hugging_face(family)
    model.eval()
    model.set_attn_implementation("eager")
    want = model(idx, output_attentions=True)
    fastgpt.accelerate(model)
    got = model(idx, output_attentions=True)
    torch.testing.assert_close(got.attentions, want.attentions)
    torch.testing.assert_close(got.logits, want.logits)


WORKER = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_compat import hugging_face
import fastgpt

dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[3]), world_size=2)
torch.set_num_threads(1)
model, idx = hugging_face("llama")
fastgpt.accelerate(model)
rank = dist.get_rank()
both = torch.nn.parallel.DistributedDataParallel(model)
half = idx[:2][rank : rank + 1]
both(half, labels=half).loss.backward()
if rank == 0:
    torch.save([p.grad for p in model.parameters()], sys.argv[4])
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    model, idx = hugging_face("llama")
    model(idx[:2], labels=idx[:2]).loss.backward()
    arguments = [sys.executable, "-P", "-c", WORKER, str(Path(__file__).parent), str(tmp_path / "meet")]
    environment = os.environ | {"PYTHONPATH": str(Path(fastgpt.__file__).parents[1])}
    runs = [
        subprocess.Popen([*arguments, str(rank), str(tmp_path / "grads")], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for run in runs:
        _, err = run.communicate(timeout=180)
        assert run.returncode == 0, err.decode()[-2000:]
    got = torch.load(tmp_path / "grads")
    torch.testing.assert_close(got, [p.grad for p in model.parameters()], rtol=1e-3, atol=1e-5)
