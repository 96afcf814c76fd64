"""`fastgpt finetune`, `predict` and `chat`: arguments to options, a run folder, and what is printed.

RUN/tokenizer.json     the tokenizer
    options.json       what the run was told
    metrics.jsonl      one line for each measurement of the held-out part, and loss.png, their picture
    summary.json       the last of them, and for classes the confusion matrix
    head.safetensors   the weights of a head; of conversations: model.safetensors
        adapter/           with LoRA, peft's two files; base.safetensors is the model it belongs to
"""

import argparse
import dataclasses
import json
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt.errors import UserError
from fastgpt.finetune.options import Options, load_options, preset_names
from fastgpt.finetune.records import Labelled, read_conversations, read_labelled, read_texts
from fastgpt.terminal import say

if TYPE_CHECKING:
    import torch

    from fastgpt.finetune.classify import Meaning
    from fastgpt.model import GPT


def finetune_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastgpt finetune`."""
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="the run folder with the pretrained model, of `fastgpt train` or finetune"
    )
    parser.add_argument(
        "--data", metavar="FILE", required=True, help="labelled texts (TSV, CSV, JSONL) or conversations (JSON, JSONL)"
    )
    parser.add_argument("--preset", metavar="NAME", help=f"ready options: {', '.join(preset_names())} (default: none)")
    parser.add_argument(
        "--out", metavar="FOLDER", help="the run folder to make (default: runs/<data>-N, the next free N)"
    )
    parser.add_argument(
        "--write-text",
        metavar="FILE",
        help="write the texts of the training part to FILE, for `fastgpt train --data FILE`, and train nothing",
    )
    hints = typing.get_type_hints(Options)
    for item in dataclasses.fields(Options):
        kinds: dict[Any, str] = {bool: "true|false", int: "N", float: "X", str: "TEXT"}
        metavar = kinds[(typing.get_args(hints[item.name]) or (hints[item.name],))[0]]
        default = (
            "none" if item.default is None else f"{item.default:g}" if isinstance(item.default, float) else item.default
        )
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            dest=item.name,
            metavar="|".join(item.metadata.get("choices", ())) or metavar,
            default=argparse.SUPPRESS,
            help=f"{item.metadata['help']} (default: {default})",
        )


def _parts(options: Options, data: Path) -> "tuple[list[Labelled], list[Labelled], Meaning]":
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
    from fastgpt.train.files import explain_writing, replace_text

    with explain_writing(path):
        replace_text(path, "".join(record.text + "\n\n" for record in train))


def load_base(run: str, options: Options) -> "tuple[GPT, Any, torch.dtype]":
    """(model, tokenizer, dtype) to fine-tune, with the dropout asked for, on the device asked for."""
    import torch

    from fastgpt.infer import load_run
    from fastgpt.model import GPT
    from fastgpt.train.evaluate import choose_dtype
    from fastgpt.train.run import choose_device

    device = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load_run(run, device)
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
    from fastgpt.train.files import explain_writing
    from fastgpt.train.run import free_folder

    folder = free_folder(str(data)) if out is None else Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; --out takes a folder that does not exist or is empty")
    with explain_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def finetune(given: argparse.Namespace) -> int:
    """`fastgpt finetune`, its arguments parsed."""
    values = dict(vars(given))
    run, preset, out, write_text = (values.pop(name) for name in ("run", "preset", "out", "write_text"))
    data = Path(values.pop("data"))
    options = load_options(preset, values)
    if write_text is None and run is None:
        raise UserError("which model? Give the run folder of a pretrained one: fastgpt finetune RUN --data FILE")
    if options.task == "chat":
        if write_text is not None:
            raise UserError("--write-text is for labelled texts: --task classify or regress")
        return _finetune_chat(run, data, out, options)
    return _finetune_head(run, data, out, write_text, options)


def _finetune_chat(run: str, data: Path, out: str | None, options: Options) -> int:
    conversations = read_conversations(data, options.encoding)
    model, tokenizer, dtype = load_base(run, options)

    import torch

    from fastgpt.finetune.chat import add_marks, grow_vocabulary, train_chat
    from fastgpt.model import save_model

    torch.manual_seed(options.seed)
    marked = add_marks(tokenizer)
    grown = grow_vocabulary(model, marked.n_vocab)
    folder = make_folder(out, data)
    save_inputs(folder, marked, run, data, options)
    lora = None
    if options.lora_rank:
        new_rows = grown is not model or marked is not tokenizer
        whole = (["wte"] if grown.config.tied_head else ["wte", "lm_head"]) if new_rows else []
        lora = {
            "rank": options.lora_rank,
            "alpha": options.lora_alpha,
            "dropout": options.lora_dropout,
            "train_whole": whole,
        }
        save_model(grown, folder / "base.safetensors")  # what the adapter belongs to
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
        base="base.safetensors",
        say=say,
    )
    print(
        f"{summary['val_conversations']:,} held-out conversations: loss of the answers {summary['val_loss']:.4f} nats a token "
        f"at step {summary['best_step']:,} of {summary['steps']:,}, whose weights are kept"
    )
    print(f"run folder: {folder}", flush=True)
    return 0


def _finetune_head(run: str, data: Path, out: str | None, write_text: str | None, options: Options) -> int:
    if options.lora_rank:
        raise UserError("--lora-rank is for --task chat; a head is trained with all weights")
    train, held_out, meaning = _parts(options, data)
    if write_text is not None:
        write_training_text(train, Path(write_text))
        say(f"{write_text}: {len(train):,} texts of the training part; the {len(held_out):,} held out are not in it")
        return 0
    model, tokenizer, dtype = load_base(run, options)
    folder = make_folder(out, data)
    save_inputs(folder, tokenizer, run, data, options)

    from fastgpt.finetune.classify import train_head

    summary = train_head(
        model,
        tokenizer,
        train,
        held_out,
        meaning,
        folder,
        recipe=options.recipe(),
        pooling=options.pooling,
        balanced=options.class_weights == "balanced",
        dtype=dtype,
        say=say,
    )
    print("\n".join(report(summary, meaning)))
    print(f"run folder: {folder}", flush=True)
    return 0


def save_inputs(folder: Path, tokenizer: Any, run: str, data: Path, options: Options) -> None:
    """tokenizer.json and options.json."""
    from fastgpt.train.files import explain_writing, replace_text

    with explain_writing(folder):
        tokenizer.save(folder / "tokenizer.json")
        told = {"run": run, "data": str(data), **dataclasses.asdict(options)}
        replace_text(folder / "options.json", json.dumps(told, indent=2) + "\n")


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


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastgpt predict`."""
    parser.add_argument("run", metavar="RUN", help="the run folder of `fastgpt finetune --task classify` or regress")
    parser.add_argument(
        "input", metavar="FILE_OR_TEXT", help="a TSV, CSV, JSONL or .txt file of texts, or a text itself"
    )
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="how to print (default: %(default)s)"
    )
    parser.add_argument("--text-column", metavar="NAME", help="the texts' column of a file, by name or number from 1")
    parser.add_argument("--encoding", metavar="NAME", help="the file's encoding (default: UTF-8)")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="where to run the model (default: %(default)s)")


def predict(given: argparse.Namespace, write: Callable[[str], object] = print) -> int:
    """`fastgpt predict`: a table, or a JSON object a line."""
    from fastgpt.finetune.classify import Predictor
    from fastgpt.train.run import choose_device

    predictor = Predictor(Path(given.run), choose_device(given.device))
    path = Path(given.input)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a text too long for a file's name, or with a NUL
        is_file = False
    if is_file:
        texts = read_texts(path, text_column=given.text_column, encoding=given.encoding)
    elif given.text_column or given.encoding:
        raise UserError(f"no such file: {given.input}; --text-column and --encoding are for files")
    else:
        texts = [given.input]
    found = predictor(texts)
    if given.format == "json":
        for text, result in zip(texts, found, strict=True):
            write(json.dumps({"text": text, **result}, ensure_ascii=False))
        return 0
    labels = predictor.meaning.labels
    width = max([10, *(len(label) for label in labels)])
    names = ("label", *(f"p({label})" for label in labels)) if labels else ("value",)
    width = max(width, *map(len, names))
    write("  ".join([f"{name:<{width}}" for name in names] + ["text"]))
    for text, result in zip(texts, found, strict=True):
        cells = (
            [f"{result['label']:<{width}}", *(f"{p:<{width}.4f}" for p in result["probabilities"].values())]
            if labels
            else [f"{result['value']:<{width}.4f}"]
        )
        words = " ".join(text.split())
        write("  ".join([*cells, words if len(words) <= 60 else words[:57] + "..."]))
    return 0


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastgpt chat`."""
    parser.add_argument("run", metavar="RUN", help="the run folder of `fastgpt finetune` on conversations")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first (default: nothing)")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=256, help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", metavar="X", type=float, default=0.7, help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--top-k", metavar="N", type=int, default=50, help="0: all tokens (default: %(default)s)")
    parser.add_argument(
        "--top-p",
        metavar="X",
        type=float,
        default=0.95,
        help="draw from the fewest that reach X (default: %(default)s)",
    )
    parser.add_argument("--seed", metavar="N", type=int, help="makes the answers repeatable (default: none)")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="where to run the model (default: %(default)s)")


def chat(given: argparse.Namespace) -> int:
    """`fastgpt chat`: one question a line of stdin, answers as they are made; /reset forgets, /exit and the end of input leave."""
    if given.seed is not None and not 0 <= given.seed < 2**62:
        raise UserError(f"--seed is {given.seed}; accepted is a whole number from 0 to 2**62 - 1")

    from fastgpt.finetune.chat import Chat
    from fastgpt.infer import load_run
    from fastgpt.tokenizer import Tokenizer
    from fastgpt.train.run import choose_device

    model, tokenizer = load_run(given.run, choose_device(given.device))
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(
            f"{given.run}: has a character tokenizer; accepted is a run of fastgpt finetune on conversations"
        )
    talk = Chat(
        model,
        tokenizer,
        system=given.system,
        max_new_tokens=given.max_new_tokens,
        temperature=given.temperature,
        top_k=given.top_k or None,
        top_p=given.top_p,
        seed=given.seed,
    )
    asks = sys.stdin.isatty()
    if asks:
        say("/reset forgets the conversation, /exit leaves")
    while True:
        if asks:
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        question = line.strip()
        if not line or question in ("/exit", "/quit"):
            return 0
        if question == "/reset":
            talk.reset()
        elif question:
            for piece in talk.ask(question):
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
            sys.stdout.flush()
