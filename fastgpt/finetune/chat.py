"""Conversations: the template that turns turns into tokens, training on the answers, and talking.

    <|system|>Be brief.<|end|><|user|>2 + 2?<|end|><|assistant|>4<|end|>

The four marks are special tokens added to the tokenizer, with rows of their own in the embedding that start at the mean of the old
rows. What people write is encoded as ordinary text, so that nobody can write a mark. Loss counts on an answer's tokens and the
<|end|> after it; every other target is -100.

No token sees another example. Packed, the examples of a batch stand one after the other in one row and attention works on each alone
(variable-length attention: `lengths` of GPT.forward), so that nothing is computed for padding. Not packed, every example has a row of
its own, in batches of like length, padded on the right where causal attention does not see the padding (fastgpt.finetune.loop). Either
way an example's loss is the same in every batch.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.errors import UserError
from fastgpt.finetune.loop import finish, fit, in_order, pad
from fastgpt.finetune.lora import adapter_tensors, add_lora, merge_lora, read_adapter, save_adapter
from fastgpt.finetune.recipe import Recipe
from fastgpt.finetune.records import Conversation, Message
from fastgpt.infer import generate
from fastgpt.model import GPT, save_model
from fastgpt.tokenizer import Tokenizer
from fastgpt.train.metrics import Metrics

MARKS = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
END = "<|end|>"
IGNORED = -100


def add_marks(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the template's special tokens after its last id; itself where it has them.

    Raises:
        UserError: a character tokenizer, which has no special tokens.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise UserError("conversations need a tokenizer with special tokens; pretrain with --tokenizer bpe")
    missing = [mark for mark in (*MARKS.values(), END) if mark not in tokenizer.special_tokens]
    if not missing:
        return tokenizer
    new = {mark: tokenizer.n_vocab + place for place, mark in enumerate(missing)}
    return Tokenizer(
        tokenizer.tokens,
        pattern=tokenizer.pattern,
        special_tokens=tokenizer.special_tokens | new,
        name=tokenizer.name,
        merges=tokenizer.merges or None,
        whole_first=tokenizer.whole_first,
    )


@torch.no_grad()
def grow_vocabulary(model: GPT, vocab_size: int) -> GPT:
    """A model with at least vocab_size tokens and the same logits for the old ones; itself where it has as many.

    New rows of the embedding, and of an untied head, are the mean of the old rows with noise of a hundredth of their standard
    deviation, from torch's default generator, so that they are not all the same.
    """
    old = model.config.vocab_size
    if vocab_size <= old:
        return model
    with torch.device("meta"):
        grown = GPT(dataclasses.replace(model.config, vocab_size=vocab_size))
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if tensor.dim() == 2 and tensor.shape[0] == old and name in ("wte.weight", "lm_head.weight"):
            mean = tensor.mean(0, keepdim=True).expand(vocab_size - old, -1)
            state[name] = torch.cat([tensor, mean + 0.01 * tensor.std() * torch.randn_like(mean)])
    grown.load_state_dict(state, assign=True)
    return grown.train(model.training)


class Template:
    """Turns as tokens.

    Args:
        tokenizer: one with the marks (`add_marks`).

    Example:
        >>> template = Template(add_marks(tokenizer))  # doctest: +SKIP
        >>> template.prompt([Message("user", "Hello")])[-1] == template.marks["assistant"]  # doctest: +SKIP
        True
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        try:
            self.marks = {role: tokenizer.special_tokens[mark] for role, mark in MARKS.items()}
            self.end = tokenizer.special_tokens[END]
        except KeyError as error:
            raise UserError(
                f"the tokenizer has no special token {error}; accepted is a run of fastgpt finetune"
            ) from error

    def turn(self, message: Message) -> list[int]:
        """A whole turn: mark, words, end."""
        return [self.marks[message.role], *self.tokenizer.encode_ordinary(message.content), self.end]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Turns so far and the mark that asks for an answer."""
        return [id for message in messages for id in self.turn(message)] + [self.marks["assistant"]]

    def example(self, messages: Sequence[Message], block_size: int) -> tuple[list[int], list[int]]:
        """(inputs, targets) of a conversation, as long as each other, at most block_size; the end of a longer one is left out.

        targets[t] is the token after inputs[t] where that is an answer's or its end, else -100. Both are empty where no answer
        begins within block_size.
        """
        ids: list[int] = []
        learned: list[bool] = []
        for message in messages:
            turn = self.turn(message)
            ids += turn
            learned += [False, *[message.role == "assistant"] * (len(turn) - 1)]
        targets = [id if counts else IGNORED for id, counts in zip(ids, learned, strict=True)][1 : block_size + 1]
        if all(target == IGNORED for target in targets):
            return [], []
        return ids[: len(targets)], targets


def batch_of(examples: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets), each (B, T) int64; padding has target -100."""
    return pad([inputs for inputs, _ in examples], 0), pad([targets for _, targets in examples], IGNORED)


def packed(examples: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """(inputs, targets, lengths): all examples one after the other, (1, T) int64 each, and the tokens of each.

    Example:
        >>> packed([([1, 2], [2, 3]), ([4], [5])])[2]
        [2, 1]
    """
    inputs = torch.tensor([[id for ids, _ in examples for id in ids]])
    targets = torch.tensor([[id for _, ids in examples for id in ids]])
    return inputs, targets, [len(ids) for ids, _ in examples]


def train_chat(
    model: GPT,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    folder: Path,
    *,
    recipe: Recipe,
    val_fraction: float = 0.1,
    split_seed: int = 1337,
    lora: dict[str, Any] | None = None,
    packing: bool = False,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Teach a model to answer; the weights of the evaluation with the lowest held-out loss are kept.

    Args:
        model: with rows for every token of the tokenizer (`grow_vocabulary`); trained in place.
        tokenizer: with the marks.
        conversations: what to learn.
        folder: where model.safetensors, metrics.jsonl, summary.json and adapter/ go; must exist. Where a checkpoint of the same
            training lies in it, that goes on.
        recipe: epochs, rates, batch.
        val_fraction, split_seed: how many conversations are held out, and which.
        lora: None trains all weights; else rank, alpha and dropout, and train_whole: modules that are trained whole.
        packing: whether the examples of a batch stand in one row without padding, or each in one of its own: the same losses.
        dtype: as `fit`.
        base: what adapter_config.json calls the model.
        say: receives lines for the user.

    Returns:
        The summary.

    Raises:
        UserError: too few conversations, none with an answer within block_size, or as `fit`.
        Stopped: as `fit`.
    """
    torch.manual_seed(recipe.seed)
    template, block_size = Template(tokenizer), model.config.block_size
    order = np.random.Generator(np.random.Philox(key=split_seed)).permutation(len(conversations)).tolist()
    held = max(1, round(val_fraction * len(conversations)))
    if held >= len(conversations):
        raise UserError(f"{len(conversations)} conversations are too few to hold some out; accepted are at least 2")
    examples = [template.example(conversations[number].messages, block_size) for number in order]
    val, train = ([example for example in part if example[0]] for part in (examples[:held], examples[held:]))
    if not val or not train:
        raise UserError(f"no answer begins within the model's {block_size} tokens; a larger block_size is needed")
    if lost := len(examples) - len(val) - len(train):
        say(f"note: {lost:,} conversations have no answer within the model's {block_size} tokens and are left out")
    lengths, val_lengths = ([len(inputs) for inputs, _ in part] for part in (train, val))
    answers = sum(target != IGNORED for _, targets in train for target in targets)
    say(
        f"conversations: {len(train):,} to train with {sum(lengths):,} tokens, {answers:,} of them answers; {len(val):,} held out"
    )
    if lora is not None:
        add_lora(model, **lora)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        say(
            f"LoRA: rank {lora['rank']}, {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters are trained"
        )
    device = model.device

    def mean_loss(chosen: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
        inputs, targets, sizes = packed(chosen) if packing else (*batch_of(chosen), None)
        _, loss = model(inputs.to(device), targets.to(device), need_logits=False, lengths=sizes)
        return loss

    def batch_loss(batch: list[int]) -> torch.Tensor:
        return mean_loss([train[number] for number in batch])

    def evaluate() -> dict[str, float]:
        total, count = 0.0, 0
        for batch in in_order(val_lengths, recipe.batch_size):
            chosen = [val[number] for number in batch]
            n_answers = sum(target != IGNORED for _, targets in chosen for target in targets)
            total, count = total + mean_loss(chosen).item() * n_answers, count + n_answers
        return {"val_loss": total / count}

    metrics = Metrics(folder / "metrics.jsonl")

    def keep(line: dict[str, float]) -> None:
        if line["val_loss"] >= min((earlier["val_loss"] for earlier in metrics.lines[:-1]), default=math.inf):
            return
        if lora is None:
            save_model(model, folder / "model.safetensors")
            return
        save_adapter(adapter_tensors(model, lora.get("train_whole", ())), folder / "adapter", base=base, **lora)

    last = fit(model, lengths, batch_loss, evaluate, keep, recipe, metrics, dtype)
    best = min(metrics.lines, key=lambda line: line["val_loss"])
    if lora is not None:
        read_adapter(model, folder / "adapter")
        merge_lora(model)
        save_model(model, folder / "model.safetensors")
    summary = {
        "task": "chat",
        "train_conversations": len(train),
        "val_conversations": len(val),
        **best,
        "best_step": best["step"],
        "steps": last["step"],
        "elapsed_s": last["elapsed_s"],
    }
    finish(folder, summary)
    return summary


class Chat:
    """A conversation with a model: its history, and answers that stream.

    Args:
        model: fine-tuned on conversations.
        tokenizer: its own, with the marks.
        system: what the model is told first; None: nothing.
        max_new_tokens, temperature, top_k, top_p: of every answer, as fastgpt.infer.generate.
        seed: makes the answers repeatable; answer n draws with seed + n. None: other answers each time.

    Raises:
        UserError: the tokenizer has no marks, or a setting out of range (at the first answer).

    Example:
        >>> chat = Chat(model, tokenizer, seed=1)  # doctest: +SKIP
        >>> "".join(chat.ask("What is 2 + 2?"))  # doctest: +SKIP
        '4.'
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        top_k: int | None = 50,
        top_p: float | None = 0.95,
        seed: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, Template(tokenizer)
        self.first = [Message("system", system)] if system else []
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.history: list[Message] = []

    def reset(self) -> None:
        """Forget everything but the system's words."""
        self.history = []

    def context(self) -> list[int]:
        """The ids that the next answer is drawn after: the system's words and as many of the last turns as fit beside the answer,
        beginning with the user's; the last one always, cut at its beginning where it does not fit alone."""
        block_size = self.model.config.block_size
        room = max(block_size - self.max_new_tokens, block_size // 2, 1)
        for begin, message in enumerate(self.history):
            ids = self.template.prompt([*self.first, *self.history[begin:]])
            if len(ids) <= room and message.role == "user":
                return ids
        return self.template.prompt([*self.first, *self.history[-1:]])[-room:]

    def ask(self, question: str) -> Iterator[str]:
        """Yields the answer piece by piece; question and answer join the history when it ends."""
        self.history.append(Message("user", question))
        seed = None if self.seed is None else self.seed + len(self.history) // 2
        stops = {self.template.end, *self.template.marks.values()}
        if self.tokenizer.eot_token is not None:
            stops.add(self.tokenizer.eot_token)
        ids = generate(
            self.model,
            self.context(),
            self.max_new_tokens,
            seed=seed,
            stop_ids=stops,
            n_vocab=self.tokenizer.n_vocab,
            **self.sampling,
        )
        return self._pieces(ids)

    def _pieces(self, ids: Iterator[int]) -> Iterator[str]:
        decoder = self.tokenizer.stream_decoder()
        answer = ""
        try:
            for id in ids:
                if piece := decoder.push(id):
                    answer += piece
                    yield piece
            if piece := decoder.finish():
                answer += piece
                yield piece
        finally:  # an answer that is cut short counts as far as it went
            self.history.append(Message("assistant", answer))
