"""A sheet of samples in Markdown: the same prompts at several temperatures and seeds, to look at side by side."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt.infer.generation import generate_text
from fastgpt.model import GPT
from fastgpt.train.files import explain_writing, replace_text

TEMPERATURES = (0.0, 0.5, 0.8, 1.0)


def sample_sheet(
    model: GPT,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    n_samples: int = 2,
    max_new_tokens: int = 200,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int = 1,
    title: str = "Samples",
) -> str:
    """Markdown with n_samples texts for every prompt and temperature; temperature 0 has one, being greedy.

    Args:
        model, tokenizer: of one run.
        prompts: what the texts go on from.
        temperatures, top_k, top_p, max_new_tokens: as `generate_text`.
        n_samples: texts for each temperature; they have the seeds seed, seed + 1, ...
        title: stands above it.

    Raises:
        UserError: as `generate_text`.

    Example:
        >>> print(sample_sheet(model, tokenizer, ["Once"], n_samples=1))  # doctest: +SKIP
    """
    parts = [f"# {title}", f"{max_new_tokens} tokens each, top-k {top_k}, top-p {top_p}."]
    for prompt in prompts:
        parts.append(f"## Prompt {prompt!r}")
        for temperature in temperatures:
            for number in range(1 if temperature == 0 else n_samples):
                pieces = generate_text(
                    model,
                    tokenizer,
                    prompt,
                    max_new_tokens,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    seed=seed + number,
                )
                text = prompt + "".join(pieces)
                fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
                head = "greedy" if temperature == 0 else f"temperature {temperature:g}, seed {seed + number}"
                parts.append(f"### {head}\n\n{fence}text\n{text}\n{fence}")
    return "\n\n".join(parts) + "\n"


def write_sheet(path: Path, model: GPT, tokenizer: Any, given: Any) -> None:
    """`fastgpt sample --sheet`: the sheet of the command line's options, written whole or not at all."""
    text = sample_sheet(
        model,
        tokenizer,
        [given.prompt],
        max_new_tokens=given.max_new_tokens,
        top_k=given.top_k or None,
        top_p=given.top_p,
        seed=1 if given.seed is None else given.seed,
        title=f"Samples of {given.run}",
    )
    with explain_writing(path):
        replace_text(path, text)
