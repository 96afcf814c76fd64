"""fastgpt: text to a trained GPT to an answer, with every hot step a kernel of our own.

Importing this package imports nothing else: names below are loaded at first use, so the tokenizer works without importing torch, and
nothing is patched.

    from fastgpt import Tokenizer        # the C++ byte-level BPE tokenizer; does not import torch
    from fastgpt import GPT, GPTConfig   # the model
    from fastgpt import ops              # softmax, gelu, layer_norm, attention, cross_entropy, ...
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "Tokenizer": "fastgpt.tokenizer",
    "CharTokenizer": "fastgpt.tokenizer",
    "load_tokenizer": "fastgpt.tokenizer",
    "get_encoding": "fastgpt.tokenizer",
    "GPT": "fastgpt.model",
    "GPTConfig": "fastgpt.model",
    "accelerate": "fastgpt.compat",
    "patched": "fastgpt.compat",
    "restore": "fastgpt.compat",
}
_SUBMODULES = ("compat", "data", "functional", "infer", "model", "nn", "ops", "tokenizer", "train")

__all__ = [
    "GPT",
    "CharTokenizer",
    "GPTConfig",
    "Tokenizer",
    "__version__",
    "accelerate",
    "get_encoding",
    "load_tokenizer",
    "patched",
    "restore",
    *_SUBMODULES,
]

if TYPE_CHECKING:
    from fastgpt import compat, data, functional, infer, model, nn, ops, tokenizer, train
    from fastgpt.compat import accelerate, patched, restore
    from fastgpt.model import GPT, GPTConfig
    from fastgpt.tokenizer import CharTokenizer, Tokenizer, get_encoding, load_tokenizer


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    elif name in _SUBMODULES:
        value = import_module(f"fastgpt.{name}")
    else:
        raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
