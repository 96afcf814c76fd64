"""Classification and regression: a head on a pretrained GPT, trained on labelled texts and measured on a held-out part.

The held-out part (a fifth where nothing else is said) is drawn by a seed, for classes from each class alike. It is measured and never
used for a choice: the weights kept are those of the last step. A number's head learns (y - mean) / standard deviation, both of the
training part, by the mean squared error; a class's head the cross-entropy, where asked weighted so that every class counts alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.errors import UserError
from fastgpt.finetune.head import WEIGHTS, HeadedGPT, load_headed, save_headed
from fastgpt.finetune.loop import finish, fit, in_order, pad
from fastgpt.finetune.recipe import Recipe
from fastgpt.finetune.records import Labelled
from fastgpt.finetune.scores import classification_scores, regression_scores
from fastgpt.model import GPT
from fastgpt.terminal import counted
from fastgpt.train.config import nearest
from fastgpt.train.metrics import Metrics

MAX_LABELS = 1000


@dataclass(frozen=True)
class Meaning:
    """What a head's outputs mean.

    Attributes:
        task: "classify" or "regress".
        labels: the classes in the order of the outputs; empty for regression.
        positive: of two classes the rarer one, which precision, recall and F1 are of; None: they are means over the classes.
        mean, std: of the training numbers; an output is (number - mean) / std.
    """

    task: str
    labels: tuple[str, ...] = ()
    positive: str | None = None
    mean: float = 0.0
    std: float = 1.0


def meaning_of(records: Sequence[Labelled], task: str, labels: Sequence[str] | None = None) -> Meaning:
    """The classes of labelled texts, or the scale of their numbers.

    Args:
        records: texts with labels; for regression those of the training part.
        task: "classify" or "regress".
        labels: the classes, in order; None: those that occur, sorted.

    Raises:
        UserError: a label outside `labels`, one that occurs once, a single one, or more than a thousand; with the line.
    """
    if task == "regress":
        numbers = np.array([float(record.label) for record in records])
        if numbers.std() == 0:
            raise UserError(f"every label is {records[0].label}; there is nothing to learn")
        return Meaning(task, mean=float(numbers.mean()), std=float(numbers.std()))
    first: dict[str, int] = {}
    counts: dict[str, int] = {}
    for record in records:
        first.setdefault(record.label, record.line)
        counts[record.label] = counts.get(record.label, 0) + 1
    known = tuple(labels) if labels is not None else tuple(sorted(counts))
    if len(set(known)) != len(known):
        raise UserError(f"--labels names a label twice: {', '.join(known)}")
    for label, line in first.items():
        if label not in known:
            raise UserError(
                f"line {line}: unknown label {label!r}{nearest(label, known)}; there are: {', '.join(known)}"
            )
    if len(known) > MAX_LABELS:
        raise UserError(
            f"{len(known):,} different labels; accepted are at most {MAX_LABELS:,} (numbers: --task regress)"
        )
    if len(known) < 2:
        raise UserError(f"the only label is {known[0]!r}; accepted are at least 2")
    for label in known:
        if counts.get(label, 0) < 2:
            where = f"line {first[label]}: " if label in first else ""
            others = [other for other in known if counts.get(other, 0) >= 2]
            raise UserError(
                f"{where}label {label!r} occurs {'once' if label in first else 'never'}{nearest(label, others)}; "
                "accepted is at least twice, once to learn and once to measure"
            )
    positive = min(known, key=lambda label: counts[label]) if len(known) == 2 else None
    return Meaning(task, known, positive)


def split(
    records: Sequence[Labelled], task: str, val_fraction: float, seed: int
) -> tuple[list[Labelled], list[Labelled]]:
    """(training part, held-out part), drawn by the seed; for classes the same share of each, at least one.

    Texts that occur several times stay on one side, so that nothing measured has been learned word for word.

    Raises:
        UserError: a part would be empty.

    Example:
        >>> train, held_out = split(records, "classify", 0.2, seed=1)  # doctest: +SKIP
    """
    same: dict[str, list[int]] = {}  # text -> the records that hold it
    for number, record in enumerate(records):
        same.setdefault(record.text, []).append(number)
    groups: dict[str, list[list[int]]] = {}
    for numbers in same.values():
        groups.setdefault(records[numbers[0]].label if task == "classify" else "", []).append(numbers)
    generator = np.random.Generator(np.random.Philox(key=seed))
    held: set[int] = set()
    for label in sorted(groups):
        texts = groups[label]
        count = max(1, round(val_fraction * len(texts)))
        if count == len(texts):
            raise UserError(
                f"{len(texts)} different text{'s' * (len(texts) != 1)}{f' of {label!r}' if label else ''} are too few to hold "
                "some out; accepted are at least 2"
            )
        for at in generator.permutation(len(texts))[:count].tolist():
            held.update(texts[at])
    return (
        [record for number, record in enumerate(records) if number not in held],
        [record for number, record in enumerate(records) if number in held],
    )


class Encoder:
    """Texts to ids that fit the model: cut at block_size, with the end-of-text token after them where the head reads the last token.

    Args:
        tokenizer: the pretrained model's.
        block_size: most ids of a text.
        pooling: the head's.
    """

    def __init__(self, tokenizer: Any, block_size: int, pooling: str) -> None:
        self.tokenizer, self.block_size = tokenizer, block_size
        self.end = [tokenizer.eot_token] if pooling == "last" and tokenizer.eot_token is not None else []
        self.cut = 0

    def __call__(self, text: str, line: int | None = None) -> list[int]:
        """The ids of one text, at least one.

        Raises:
            UserError: the tokenizer has no ids for it.
        """
        if not text.strip():
            raise UserError(f"{f'line {line}: ' if line else ''}the text is empty")
        encode = getattr(self.tokenizer, "encode_ordinary", self.tokenizer.encode)
        try:
            ids: list[int] = encode(text)
        except ValueError as error:
            raise UserError(
                f"{f'line {line}: ' if line else ''}the tokenizer cannot encode the text: {error}"
            ) from error
        room = self.block_size - len(self.end)
        self.cut += len(ids) > room
        return ids[: max(room, 1)] + self.end


def outputs(model: HeadedGPT, rows: Sequence[list[int]], batch_size: int = 32) -> torch.Tensor:
    """(N, K) outputs of N rows of ids, in the order given; the model must be in evaluation mode.

    Call it under torch.no_grad() or inference_mode().
    """
    lengths = [len(row) for row in rows]
    result = torch.empty(len(rows), model.head.out_features)
    for batch in in_order(lengths, batch_size):
        idx = pad([rows[number] for number in batch], 0).to(model.gpt.device)
        sizes = torch.tensor([lengths[number] for number in batch], device=model.gpt.device)
        result[torch.tensor(batch)] = model(idx, sizes).float().cpu()
    return result


def targets_of(records: Sequence[Labelled], meaning: Meaning) -> torch.Tensor:
    """(N) int64 class numbers, or (N) fp32 numbers on the head's scale."""
    if meaning.task == "classify":
        place = {label: number for number, label in enumerate(meaning.labels)}
        return torch.tensor([place[record.label] for record in records])
    return torch.tensor([(float(record.label) - meaning.mean) / meaning.std for record in records])


def class_weights(targets: torch.Tensor, n_classes: int) -> torch.Tensor:
    """(K) fp32: N / (K x count), so that every class has the same weight in all and the mean over examples is 1."""
    counts = torch.bincount(targets, minlength=n_classes).clamp(min=1)
    return len(targets) / (n_classes * counts.float())


def loss_of(found: torch.Tensor, targets: torch.Tensor, meaning: Meaning, weights: torch.Tensor | None) -> torch.Tensor:
    """The scalar loss of (B, K) outputs: cross-entropy, weighted by the target's class, or the mean squared error."""
    if meaning.task == "regress":
        return F.mse_loss(found[:, 0], targets)
    if weights is None:
        return ops.cross_entropy(found, targets)
    return (ops.cross_entropy(found, targets, reduction="none") * weights[targets]).mean()


def scores(found: torch.Tensor, records: Sequence[Labelled], meaning: Meaning) -> dict[str, Any]:
    """The task's scores of (N, K) outputs against the labels; see fastgpt.finetune.scores."""
    if meaning.task == "classify":
        truth = targets_of(records, meaning)
        return classification_scores(truth.numpy(), found.argmax(1).numpy(), meaning.labels, meaning.positive)
    guess = found[:, 0].double().numpy() * meaning.std + meaning.mean
    return regression_scores([float(record.label) for record in records], guess)


def train_head(
    gpt: GPT,
    tokenizer: Any,
    train: Sequence[Labelled],
    held_out: Sequence[Labelled],
    meaning: Meaning,
    folder: Path,
    *,
    recipe: Recipe,
    pooling: str = "mean",
    balanced: bool = False,
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a head and the GPT under it; everything goes into the run folder.

    Args:
        gpt: the pretrained model; trained in place.
        tokenizer: its tokenizer.
        train, held_out: the two parts.
        meaning: of the outputs.
        folder: where head.safetensors, metrics.jsonl and summary.json go; must exist. Where a checkpoint of the same training
            lies in it, that goes on.
        recipe: epochs, rates, batch.
        pooling: "mean" or "last".
        balanced: weigh the classes alike.
        dtype: as `fit`.
        say: receives lines for the user.

    Returns:
        The summary: the last line of metrics and the scores, with the confusion matrix for classes.

    Raises:
        UserError: a text cannot be encoded, or as `fit`.
        Stopped: as `fit`.
    """
    torch.manual_seed(recipe.seed)
    model = HeadedGPT(gpt, max(len(meaning.labels), 1), pooling)
    encode = Encoder(tokenizer, gpt.config.block_size, pooling)
    rows = [encode(record.text, record.line) for record in train]
    val_rows = [encode(record.text, record.line) for record in held_out]
    lengths = [len(row) for row in rows]
    say(f"texts: {len(train):,} to train with {sum(lengths):,} tokens, {len(held_out):,} held out")
    if encode.cut:
        say(
            f"note: longer than the model's {gpt.config.block_size} tokens: {counted(encode.cut, 'text')}; what is over is left out"
        )
    targets, val_targets = targets_of(train, meaning), targets_of(held_out, meaning)
    weights = class_weights(targets, len(meaning.labels)) if balanced and meaning.task == "classify" else None
    device = gpt.device

    def batch_loss(batch: list[int]) -> torch.Tensor:
        idx = pad([rows[number] for number in batch], 0).to(device)
        sizes = torch.tensor([lengths[number] for number in batch], device=device)
        wanted = targets[torch.tensor(batch)].to(device)
        return loss_of(model(idx, sizes), wanted, meaning, weights if weights is None else weights.to(device))

    def evaluate() -> dict[str, float]:
        found = outputs(model, val_rows)
        loss = loss_of(found, val_targets, meaning, weights)
        values = {name: value for name, value in scores(found, held_out, meaning).items() if isinstance(value, float)}
        return {"val_loss": loss.item(), **{f"val_{name}": value for name, value in values.items()}}

    def keep(line: dict[str, float]) -> None:
        save_headed(model, folder / WEIGHTS, asdict(meaning))

    metrics = Metrics(folder / "metrics.jsonl")
    unit = "nats per text" if meaning.labels else "squared error in standard deviations"
    last = fit(model, lengths, batch_loss, evaluate, keep, recipe, metrics, dtype, unit)
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
        final = scores(outputs(model, val_rows), held_out, meaning)
    summary = {"task": meaning.task, "train_texts": len(train), "val_texts": len(held_out), **last, **final}
    finish(folder, summary)
    return summary


class Predictor:
    """The model of a fine-tuned run, for new texts.

    Args:
        folder: a run folder of `fastgpt finetune --task classify` or `regress`.
        device: where to run.

    Raises:
        UserError: the folder holds no such run.

    Example:
        >>> Predictor(Path("runs/sms"))(["Free entry! Text WIN to 80086"])[0]["label"]  # doctest: +SKIP
        'spam'
    """

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        from fastgpt.tokenizer import load_tokenizer

        if not folder.is_dir():
            raise UserError(f"there is no run at {folder}: no such folder")
        self.model, meaning = load_headed(folder / WEIGHTS, device)
        self.meaning = Meaning(**{**meaning, "labels": tuple(meaning["labels"])})
        try:
            self.encode = Encoder(
                load_tokenizer(folder / "tokenizer.json"), self.model.gpt.config.block_size, self.model.pooling
            )
        except (OSError, ValueError) as error:
            raise UserError(f"the run {folder} is damaged: tokenizer.json: {error}") from error

    def __call__(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """For each text {"label", "probabilities": {label: p}}, or {"value"} for a number; fp32."""
        rows = [self.encode(text) for text in texts]
        if not rows:
            return []
        with torch.inference_mode():
            found = outputs(self.model, rows)
        if self.meaning.task == "regress":
            return [{"value": value * self.meaning.std + self.meaning.mean} for value in found[:, 0].tolist()]
        return [
            {
                "label": self.meaning.labels[max(range(len(row)), key=row.__getitem__)],
                "probabilities": dict(zip(self.meaning.labels, row, strict=True)),
            }
            for row in ops.softmax(found, -1).tolist()
        ]
