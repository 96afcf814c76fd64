"""Generation: tokens one at a time from a model and its cache, and the same as text that appears while it is made.

The prompt is read in one pass, each new token costs one position. When the context reaches block_size the cache is
full; learned positions cannot slide, so the cache is emptied and the last block_size // 2 tokens are read again at
positions 0 on. The context of a later token is therefore between block_size / 2 and block_size tokens long, and
re-reading costs about one extra position a token; a window that slid by one token would cost a whole pass each time. Up
to block_size tokens in all, nothing is ever re-read and the result is the uncached model's.

Of a prompt longer than block_size only the last block_size tokens are read.

One sequence at a time; no batches.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch

from fastgpt.errors import UserError
from fastgpt.infer.cache import KVCache
from fastgpt.infer.sampling import candidates, sample_logits
from fastgpt.model import GPT


class StreamDecoder(Protocol):
    """Turns ids into text as whole characters only."""

    def push(self, id: int, /) -> str: ...
    def finish(self) -> str: ...


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer; both of fastgpt.tokenizer have it."""

    @property
    def n_vocab(self) -> int: ...
    @property
    def eot_token(self) -> int | None: ...
    def encode(self, text: str, /) -> list[int]: ...
    def stream_decoder(self) -> StreamDecoder: ...


def generate(
    model: GPT,
    ids: Sequence[int] | torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int | None = None,
    stop_ids: Iterable[int] = (),
    n_vocab: int | None = None,
) -> Iterator[int]:
    """Yields new token ids, each as soon as it is drawn.

    Args:
        model: a GPT; in evaluation mode while the iterator runs, and as it was afterwards.
        ids: the prompt, at least one token id: a sequence of ints or an integer tensor (T,) or (1, T).
        max_new_tokens: the most ids to yield.
        temperature, top_k, top_p: as fastgpt.infer.candidates; temperature 0 is greedy.
        seed: makes the ids repeatable on one machine; the draws have a generator of their own, and torch's is left
            alone. None: other ids each time.
        stop_ids: an id of these ends generation and is not yielded.
        n_vocab: ids from here on are never drawn, for a model whose vocab_size is padded beyond its tokenizer's; None:
            all may be.

    Returns:
        An iterator of ints. Everything is checked before it is returned, not at its first step.

    Raises:
        UserError: no prompt, an id out of range, or a setting out of its range.

    Example:
        >>> ids = list(generate(model, [5, 3, 8], 20, seed=1))
        >>> ids == list(generate(model, [5, 3, 8], 20, seed=1))
        True
    """
    vocab_size = model.config.vocab_size
    n_vocab = vocab_size if n_vocab is None else n_vocab
    if not 1 <= n_vocab <= vocab_size:
        raise UserError(f"n_vocab: got {n_vocab}; accepted: 1 to the model's vocab_size = {vocab_size}")
    prompt = [int(id) for id in (ids.flatten().tolist() if isinstance(ids, torch.Tensor) else ids)]
    if not prompt:
        raise UserError("ids: the prompt holds no token; accepted: at least 1")
    for position, id in enumerate(prompt):
        if not 0 <= id < n_vocab:
            raise UserError(f"ids: token id {id} at position {position}; accepted: 0 to {n_vocab - 1}")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise UserError(f"max_new_tokens: got {max_new_tokens!r}; accepted: a whole number of at least 0")
    try:
        candidates(torch.zeros(1, 1), temperature, top_k, top_p)
    except ValueError as error:
        raise UserError(str(error)) from None
    generator = torch.Generator(model.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def sample(logits: torch.Tensor) -> int:
        return int(sample_logits(logits[:, -1, :n_vocab], temperature, top_k, top_p, generator))

    return _steps(model, prompt, max_new_tokens, sample, frozenset(stop_ids))


def _steps(
    model: GPT, context: list[int], max_new_tokens: int, sample: Callable[[torch.Tensor], int], stop_ids: frozenset[int]
) -> Iterator[int]:
    """The loop of `generate`; `context` grows by each token."""
    block_size = model.config.block_size
    cache = KVCache(model.config)
    unread = context[-block_size:]
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            # Entered anew for each token: a mode left on across a yield would act on the caller's code.
            with torch.inference_mode():
                if cache.length == block_size:
                    cache.reset()
                    unread = context[-max(1, block_size // 2) :]
                logits, _ = model(torch.tensor([unread], device=model.device), cache=cache)  # (1, 1, V)
                token = sample(logits)
            if token in stop_ids:
                return
            context.append(token)
            unread = [token]
            yield token
    finally:
        model.train(was_training)


def generate_text(
    model: GPT,
    tokenizer: TextTokenizer,
    prompt: str = "",
    max_new_tokens: int = 200,
    *,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int | None = None,
    stop_ids: Iterable[int] | None = None,
) -> Iterator[str]:
    """Yields the text that follows a prompt, piece by piece; a piece holds whole characters only, and the prompt is not
    repeated.

    Args:
        model: a GPT.
        tokenizer: the one it was trained with.
        prompt: ordinary text; special tokens in it are not recognised. Where it is empty, generation starts after the
            tokenizer's end-of-text token, or where it has none after a line break, or where it has none of those either
            after token 0.
        max_new_tokens, temperature, top_k, top_p, seed: as `generate`.
        stop_ids: ids that end the text; the end-of-text token where None.

    Returns:
        An iterator of non-empty strings. Everything is checked before it is returned.

    Raises:
        UserError: the tokenizer has more tokens than the model, cannot encode the prompt, or as `generate`.

    Example:
        >>> text = "".join(generate_text(model, tokenizer, "the", 20, seed=1))
        >>> len(text)
        20
    """
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(
            f"tokenizer: has {tokenizer.n_vocab} tokens and the model {model.config.vocab_size}; "
            "it is not the one that the model was trained with"
        )
    if stop_ids is None:
        stop_ids = () if tokenizer.eot_token is None else (tokenizer.eot_token,)
    tokens = generate(
        model,
        _encode_prompt(tokenizer, prompt),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_ids=stop_ids,
        n_vocab=tokenizer.n_vocab,
    )
    return _pieces(tokens, tokenizer.stream_decoder())


def _encode_prompt(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    if prompt:
        try:
            return tokenizer.encode(prompt)
        except ValueError as error:
            raise UserError(f"prompt: {error}") from error
    if tokenizer.eot_token is not None:
        return [tokenizer.eot_token]
    try:
        return tokenizer.encode("\n") or [0]
    except ValueError:  # a character tokenizer whose text had one line
        return [0]


def _pieces(tokens: Iterator[int], decoder: StreamDecoder) -> Iterator[str]:
    for token in tokens:
        if piece := decoder.push(token):
            yield piece
    if piece := decoder.finish():
        yield piece
