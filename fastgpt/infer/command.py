"""`fastgpt sample` and `fastgpt evaluate`."""

import json
from collections.abc import Sequence
from pathlib import Path

from fastgpt.errors import UserError
from fastgpt.terminal import command_parser, import_torch, stream


def sample(arguments: Sequence[str]) -> int:
    """`fastgpt sample`."""
    parser = command_parser("sample", "Print text from a trained model, as it is made.")
    parser.add_argument("run", metavar="RUN", help="the run folder that `fastgpt train` wrote")
    parser.add_argument(
        "--prompt", metavar="TEXT", default="", help="the text to go on from (default: none, a fresh start)"
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=200, help="tokens to make (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", metavar="X", type=float, default=0.8, help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument(
        "--top-k",
        metavar="N",
        type=int,
        default=50,
        help="draw from the N most probable tokens, 0: all (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        metavar="X",
        type=float,
        default=0.95,
        help="draw from the fewest that reach X (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, help="makes the text repeatable (default: none, other text each time)"
    )
    parser.add_argument("--device", metavar="NAME", default="cpu", help="where to run the model (default: %(default)s)")
    parser.add_argument(
        "--sheet", metavar="FILE", help="write samples at four temperatures into this Markdown file (default: none)"
    )
    given = parser.parse(arguments)
    if given.seed is not None and not 0 <= given.seed < 2**63:
        raise UserError(f"--seed is {given.seed}; accepted is a whole number from 0 to 2**63 - 1")

    import_torch()
    from fastgpt.infer.generation import generate_text
    from fastgpt.infer.run import load_run
    from fastgpt.train.run import choose_device

    model, tokenizer = load_run(given.run, choose_device(given.device))
    if given.sheet is not None:
        from fastgpt.infer.sheet import write_sheet

        write_sheet(Path(given.sheet), model, tokenizer, given)
        print(f"samples: {given.sheet}")
        return 0
    pieces = generate_text(
        model,
        tokenizer,
        given.prompt,
        given.max_new_tokens,
        temperature=given.temperature,
        top_k=given.top_k or None,
        top_p=given.top_p,
        seed=given.seed,
    )
    stream(given.prompt, pieces)
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """`fastgpt evaluate`."""
    parser = command_parser(
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

    import_torch()
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
