"""The GPT, its configuration, its initialisation schemes, its weights file, and the bigram baseline that it has to
beat.

from fastgpt.model import GPT, GPTConfig, load_model, save_model

model = GPT(GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128))
logits, loss = model(idx, targets)   # idx, targets (B, T) int64 -> (B, T, 65), scalar
save_model(model, "model.safetensors")
"""

from fastgpt.model.bigram import BigramModel
from fastgpt.model.config import GPTConfig
from fastgpt.model.gguf import load_gguf, load_gguf_tokenizer, save_gguf
from fastgpt.model.gpt import GPT
from fastgpt.model.init import INIT_SCHEMES, init_weights
from fastgpt.model.weights import load_model, load_weights, read_config, save_model

__all__ = [
    "GPT",
    "INIT_SCHEMES",
    "BigramModel",
    "GPTConfig",
    "init_weights",
    "load_gguf",
    "load_gguf_tokenizer",
    "load_model",
    "load_weights",
    "read_config",
    "save_gguf",
    "save_model",
]
