"""Text from a trained model: the cache of keys and values, sampling, generation, and reading a run folder.

from fastgpt.infer import generate_text, load_run

model, tokenizer = load_run("runs/shakespeare")
for piece in generate_text(model, tokenizer, "ROMEO:", max_new_tokens=200, seed=1):
    print(piece, end="", flush=True)
"""

from fastgpt.infer.cache import KVCache
from fastgpt.infer.generate import generate, generate_text
from fastgpt.infer.run import load_run
from fastgpt.infer.sampling import candidates, sample_logits

__all__ = ["KVCache", "candidates", "generate", "generate_text", "load_run", "sample_logits"]
