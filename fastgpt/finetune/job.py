"""One fine-tuning from its data and model to its run folder: begun, or gone on with after a stop.

The folder's first file is options.json, from which a resume knows everything else; a start that fails before there are weights or a
checkpoint leaves no folder.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt.data.shards import file_sha256
from fastgpt.errors import UserError
from fastgpt.finetune.options import Options, change_options
from fastgpt.finetune.recipe import CHECKPOINT
from fastgpt.finetune.records import Labelled, read_conversations, read_labelled
from fastgpt.terminal import say
from fastgpt.train.files import explain_writing, replace_text

if TYPE_CHECKING:
    import torch

    from fastgpt.finetune.classify import Meaning
    from fastgpt.model import GPT

FREE = ("checkpoint_interval", "device", "threads", "track")  # options that a resume may change


@dataclass
class Job:
    """One fine-tuning: the model's place, the data's, and the options."""

    run: str
    data: Path
    options: Options


def parts(options: Options, data: Path) -> "tuple[list[Labelled], list[Labelled], Meaning]":
    """(training part, held-out part, meaning of the outputs) of labelled texts.

    Raises:
        UserError: as `read_labelled`, `meaning_of` and `split`.
    """
    from fastgpt.finetune.classify import meaning_of, split

    records = read_labelled(
        data,
        numbers=options.task == "regress",
        text_column=options.text_column,
        label_column=options.label_column,
        encoding=options.encoding,
    )
    names = [name.strip() for name in options.labels.split(",")] if options.labels is not None else None
    try:
        meaning = meaning_of(records, options.task, names)
        train, held_out = split(records, options.task, options.val_fraction, options.split_seed)
        if options.task == "regress":
            meaning = meaning_of(train, options.task)
    except UserError as error:
        raise UserError(f"{data}: {error}") from error
    return train, held_out, meaning


def write_training_text(train: Sequence[Labelled], path: Path) -> None:
    """The training part's texts as one text to pretrain on, a blank line between them, in the order of the file."""
    with explain_writing(path):
        replace_text(path, "".join(record.text + "\n\n" for record in train))


def load_base(run: str, options: Options) -> "tuple[GPT, Any, torch.dtype]":
    """(model, tokenizer, dtype) to fine-tune, with the dropout asked for, on the device asked for."""
    import torch

    from fastgpt.finetune.chat import grow_vocabulary
    from fastgpt.infer.run import load_pretrained
    from fastgpt.model import GPT
    from fastgpt.train.evaluate import choose_dtype
    from fastgpt.train.run import choose_device

    device = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model, tokenizer = load_pretrained(run, device)
    model = grow_vocabulary(model, tokenizer.n_vocab)  # a GGUF file's bytes that its model never saw
    if options.dropout is not None:
        with torch.device("meta"):
            changed = GPT(dataclasses.replace(model.config, dropout=options.dropout))
        changed.load_state_dict(model.state_dict(), assign=True)
        model = changed
    return model, tokenizer, choose_dtype(options.dtype, device)


def make_folder(out: str | None, data: Path) -> Path:
    """The new run folder, empty.

    Raises:
        UserError: there is something at that place, or it cannot be made.
    """
    from fastgpt.train.run import free_folder

    folder = free_folder(str(data)) if out is None else Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        more = f"; --resume {folder} goes on with it" if (folder / CHECKPOINT).is_file() else ""
        raise UserError(f"{folder} is not empty; --out takes a folder that does not exist or is empty{more}")
    with explain_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def resumed(folder: Path, values: dict[str, str], others: list[str], data: str | None) -> Job:
    """The job of a folder that was begun, its options as they were but for those that do not change the result.

    Raises:
        UserError: no such folder, nothing to go on with, or something that would make it another run.
    """
    if others:
        raise UserError(f"--resume goes on in its own folder with its own model and options; leave out {others[0]!r}")
    if not (folder / "options.json").is_file():
        raise UserError(f"there is no fine-tuning at {folder}: it has no options.json")
    if (folder / "summary.json").is_file():
        raise UserError(f"the fine-tuning {folder} is finished; --out with another folder starts a new one")
    try:
        told = json.loads((folder / "options.json").read_text(encoding="utf-8"))
        run, stored, sha256 = told.pop("run"), told.pop("data"), told.pop("data_sha256")
        options = Options(**told)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'options.json'} is damaged, or of another version: {error!r}") from error
    for name in values:
        if name not in FREE:
            free = ", ".join(f"--{other.replace('_', '-')}" for other in FREE)
            raise UserError(f"--{name.replace('_', '-')} cannot change on a resume; accepted beside it are {free}")
    path = Path(stored if data is None else data)
    if not path.is_file():
        raise UserError(f"the data {path} are not there; --data names their new place")
    if file_sha256(path) != sha256:
        raise UserError(f"{path} is not the file that {folder} was begun with: its content is another")
    return Job(run, path, change_options(options, values))


def save_inputs(folder: Path, job: Job) -> None:
    """options.json, the first file of a run: all that a resume needs to know."""
    told = {"run": job.run, "data": str(job.data.resolve()), "data_sha256": file_sha256(job.data)}
    if Path(job.run).exists():
        told["run"] = str(Path(job.run).resolve())
    with explain_writing(folder):
        replace_text(folder / "options.json", json.dumps(told | dataclasses.asdict(job.options), indent=2) + "\n")


def remove_unused(folder: Path) -> None:
    """Empty and remove the folder of a run that failed before it had a checkpoint or weights."""
    names = ("options.json", "tokenizer.json", "base.safetensors", "metrics.jsonl")
    there = {path.name for path in folder.iterdir()}
    if there <= set(names):
        for name in there:
            (folder / name).unlink()
        folder.rmdir()


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    with explain_writing(folder):
        tokenizer.save(folder / "tokenizer.json")


def chat_of(job: Job) -> Callable[[Path], list[str]]:
    """Reads the conversations and the model; what then trains in a folder and returns the lines that a user reads at the end."""
    options = job.options
    conversations = read_conversations(job.data, options.encoding)
    model, tokenizer, dtype = load_base(job.run, options)

    import torch

    from fastgpt.finetune.chat import add_marks, grow_vocabulary, train_chat
    from fastgpt.model import load_model, save_model
    from fastgpt.tokenizer import load_tokenizer

    torch.manual_seed(options.seed)
    marked = add_marks(tokenizer)
    grown = grow_vocabulary(model, marked.n_vocab)
    lora: dict[str, Any] | None = None
    if options.lora_rank:
        new_rows = grown is not model or marked is not tokenizer
        whole = (["wte"] if grown.config.tied_head else ["wte", "lm_head"]) if new_rows else []
        lora = {
            "rank": options.lora_rank,
            "alpha": options.lora_alpha,
            "dropout": options.lora_dropout,
            "train_whole": whole,
        }

    def train(folder: Path) -> list[str]:
        base = folder / "base.safetensors"  # what the adapter belongs to
        if (folder / CHECKPOINT).is_file():
            given = marked if not (folder / "tokenizer.json").is_file() else load_tokenizer(folder / "tokenizer.json")
            if given.n_vocab != marked.n_vocab or given.tokens != marked.tokens:
                raise UserError(f"the tokenizer of {job.run} is not the one that {folder} was begun with")
            if lora is not None:
                grown.load_state_dict(load_model(base, grown.device).state_dict())
        else:
            _save_tokenizer(marked, folder)
            if lora is not None:
                save_model(grown, base)
        summary = train_chat(
            grown,
            marked,
            conversations,
            folder,
            recipe=options.recipe(),
            val_fraction=options.val_fraction,
            split_seed=options.split_seed,
            lora=lora,
            packing=options.packing,
            dtype=dtype,
            base=base.name,
            say=say,
        )
        return [
            f"{summary['val_conversations']:,} held-out conversations: loss of the answers {summary['val_loss']:.4f} nats a token "
            f"at step {summary['best_step']:,} of {summary['steps']:,}, whose weights are kept"
        ]

    return train


def head_of(job: Job) -> Callable[[Path], list[str]]:
    """The same for classes and numbers."""
    options = job.options
    train_part, held_out, meaning = parts(options, job.data)
    model, tokenizer, dtype = load_base(job.run, options)

    from fastgpt.finetune.classify import train_head

    def train(folder: Path) -> list[str]:
        _save_tokenizer(tokenizer, folder)
        summary = train_head(
            model,
            tokenizer,
            train_part,
            held_out,
            meaning,
            folder,
            recipe=options.recipe(),
            pooling=options.pooling,
            balanced=options.class_weights == "balanced",
            dtype=dtype,
            say=say,
        )
        return report(summary, meaning)

    return train


def report(summary: dict[str, Any], meaning: "Meaning") -> list[str]:
    """The lines that a user reads at the end."""
    if meaning.task == "regress":
        return [
            f"{summary['val_texts']:,} held-out texts: RMSE {summary['rmse']:.4f}, Pearson {summary['pearson']:.4f}, "
            f"Spearman {summary['spearman']:.4f}"
        ]
    of = f"of {meaning.positive!r}" if meaning.positive is not None else "means over the labels"
    width = max(8, *(len(label) for label in meaning.labels))
    lines = [
        f"{summary['val_texts']:,} held-out texts: accuracy {summary['accuracy']:.4f}, F1 {summary['f1']:.4f}, "
        f"precision {summary['precision']:.4f}, recall {summary['recall']:.4f} ({of})",
        "row: true label, column: predicted",
        " ".join(f"{name:>{width}}" for name in ("", *meaning.labels)),
    ]
    for label, counts in zip(meaning.labels, summary["confusion"], strict=True):
        lines.append(" ".join([f"{label:>{width}}", *(f"{count:>{width},}" for count in counts)]))
    return lines
