"""Text from a trained model: the cache of keys and values, sampling, generation, and reading a run folder.

    from fastgpt.infer import generate_text, load_run

    model, tokenizer = load_run("runs/shakespeare")
    for piece in generate_text(model, tokenizer, "ROMEO:", max_new_tokens=200, seed=1):
        print(piece, end="", flush=True)

The names below load what they need, torch among it, at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.infer.cache import KVCache
    from fastgpt.infer.generation import generate, generate_text
    from fastgpt.infer.run import load_run
    from fastgpt.infer.sampling import candidates, sample_logits

__all__ = ["KVCache", "candidates", "generate", "generate_text", "load_run", "sample_logits"]

_LAZY = {
    "KVCache": "cache",
    "candidates": "sampling",
    "generate": "generation",
    "generate_text": "generation",
    "load_run": "run",
    "sample_logits": "sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastgpt.infer' has no attribute {name!r}")
    return getattr(import_module(f"fastgpt.infer.{_LAZY[name]}"), name)
