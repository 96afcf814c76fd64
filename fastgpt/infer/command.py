"""`fastgpt evaluate`, and the sheet of `fastgpt sample`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastgpt.errors import UserError


def evaluate(arguments: Sequence[str], new_parser: Callable[[str, str], Any]) -> int:
    """Run `fastgpt evaluate`.

    Args:
        arguments: those after `evaluate`.
        new_parser: makes a parser of the command line from a command's name and description.
    """
    parser = new_parser(
        "evaluate",
        "How well a model predicts texts: loss, perplexity, bits a byte. Without a file: what the run's losses say,\n"
        "where training and validation part, and what to do.",
    )
    parser.add_argument("run", metavar="RUN", help="the run folder that `fastgpt train` wrote")
    parser.add_argument("files", metavar="FILE", nargs="*", help="files of UTF-8 text (default: none, the report)")
    parser.add_argument(
        "--stride", metavar="N", type=int, help="tokens that a window scores (default: half of the block size)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, a line a file (default: text)")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="where to run the model (default: %(default)s)")
    given = parser.parse(arguments)
    if not given.files:
        return _report(Path(given.run), given.json)

    from fastgpt.data.corpora import read_text
    from fastgpt.infer.evaluate import evaluate_text
    from fastgpt.infer.run import load_run
    from fastgpt.train.run import choose_device

    texts = [read_text(Path(file)) for file in given.files]
    model, tokenizer = load_run(given.run, choose_device(given.device))
    if given.stride is not None and not 1 <= given.stride <= model.config.block_size:
        raise UserError(f"--stride is {given.stride}; accepted is 1 to the block size, {model.config.block_size}")
    for file, text in zip(given.files, texts, strict=True):
        try:
            found = evaluate_text(model, tokenizer, text, stride=given.stride)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        if given.json:
            print(json.dumps({"file": file} | found.to_dict()), flush=True)
        else:
            print(
                f"{file}: loss {found.loss:.4f}, perplexity {found.perplexity:,.2f}, {found.bits_per_byte:.4f} bits per byte "
                f"({found.tokens:,} tokens, {found.bytes:,} bytes)",
                flush=True,
            )
    return 0


def _report(run: Path, as_json: bool) -> int:
    from fastgpt.train.metrics import Metrics
    from fastgpt.train.report import overfitting_report

    if not (run / "metrics.jsonl").is_file():
        raise UserError(
            f"{run} has no metrics.jsonl: it is not a run folder that training wrote, or it has no evaluation yet"
        )
    sentences = overfitting_report(Metrics(run / "metrics.jsonl").lines)
    print(json.dumps({"report": sentences}) if as_json else "\n".join(sentences))
    return 0
