"""README's tables, made from result files: `python -m fastgpt.benchmarks.table benchmarks/results/<chip>`.

Every figure is the median of the fastest other variant of a case (torch eager, `torch.compile`, SDPA, `out=`, fused) over ours: the two
were timed in turns in one run. Rows whose results are not there are left out.
"""

import argparse
from pathlib import Path
from typing import Any

from . import record

DTYPES = ("fp32", "bf16")

# A row's words, the result file, its case, with {dtype} for the dtype, and which variant is ours, if not `fastgpt`.
ROWS = [
    (f"causal attention, forward + backward, B{b} H{h} T{t} D{d}", "attention", f"forward and backward {{dtype}} {b}x{h}x{t}x{d}")
    for b, h, t, d in ((4, 12, 1024, 64), (8, 6, 256, 64), (12, 4, 64, 32), (1, 12, 4096, 64))
] + [
    ("one query on a KV cache of 1024, H12 D64", "attention", "KV cache one query {dtype} 1x12x1024x64"),
    ("dropout 8192 x 768, forward", "dropout", "forward {dtype} 8192x768"),
    ("the same, forward + backward", "dropout", "forward and backward {dtype} 8192x768"),
    ("embedding's backward into a gradient, 8192 of 50257 x 768", "embedding", "into .grad backward into .grad {dtype} 8192x50257x768"),
    ("tanh, 8M, result preallocated", "activation", "tanh out= forward {dtype} 8192x1024"),
    ("gelu (tanh form), 8M, result preallocated", "activation", "gelu_tanh out= forward {dtype} 8192x1024"),
    ("gelu (erf form), 8M, result preallocated", "activation", "gelu out= forward {dtype} 8192x1024"),
    ("softmax 49152 x 1024, result preallocated", "softmax", "out= forward {dtype} 49152x1024"),
    ("the same, fresh results, forward + backward", "softmax", "forward and backward {dtype} 49152x1024"),
    ("cross_entropy 4096 x 50257, forward + backward", "cross_entropy", "forward and backward {dtype} 4096x50257"),
    ("the same, the gradient in place of the logits", "cross_entropy", "forward and backward {dtype} 4096x50257", "fastgpt in place"),
    ("layer_norm 8192 x 768, forward + backward", "layer_norm", "forward and backward {dtype} 8192x768"),
    ("clipping, AdamW and zeroing, 124M parameters", "adamw", "12 layers, 768 wide: clip, update and zero {dtype}"),
    ("relu on a small tensor, 768 x 512, forward + backward", "activation", "relu forward and backward {dtype} 768x512"),
    ("layer_norm on a small tensor, 768 x 128, forward + backward", "layer_norm", "forward and backward {dtype} 768x128"),
]  # fmt: skip

# A step's words and how its cases begin.
STEPS = [
    ("4 layers, 128 wide, T 64, B 12 (nanoGPT's run on a CPU)", "4 layers, 128 wide, T 64, B 12: "),
    ("6 layers, 384 wide, T 256, B 16", "6 layers, 384 wide, T 256, B 16: "),
    ("GPT-2 124M, T 256, B 4", "12 layers, 768 wide, T 256, B 4: "),
]
SETTINGS = [("fp32", "step fp32"), ('fp32, "medium" products', "step, products medium, fp32"), ("bf16", "step bf16")]


def medians(case: dict[str, Any], name: str = "fastgpt") -> tuple[float, float]:
    """Milliseconds of our variant and of the fastest other."""
    ours = next(variant["median_ms"] for variant in case["variants"] if variant["name"] == name)
    return ours, min(variant["median_ms"] for variant in case["variants"] if not variant["ours"])


def times(ratio: float) -> str:
    return f"{ratio:.0f} x" if ratio >= 9.95 else f"{ratio:.1f} x"


def ops_table(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| what | fp32 | bf16 |", "|---|---|---|"]
    for words, file, name, *variant in ROWS:
        cells = []
        for dtype in DTYPES:
            case = results.get(file, {}).get(name.format(dtype=dtype))
            ours, other = medians(case, *variant) if case else (1.0, 0.0)
            cells.append(times(other / ours) if case else "")
        if any(cells):
            lines.append(f"| {words} | {' | '.join(cells)} |")
    return lines


def steps_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Steps a setting, and our fastest against torch's fastest of all."""
    cases = results.get("train_step", {})
    lines = [
        f"| training step | {' | '.join(setting for setting, _ in SETTINGS)} | fastest of each |",
        "|---|---|---|---|---|",
    ]
    for words, start in STEPS:
        found = {setting: medians(cases[start + name]) for setting, name in SETTINGS if start + name in cases}
        if not found:
            continue
        cells = [times(found[s][1] / found[s][0]) if s in found else "" for s, _ in SETTINGS]
        ours, other = (min(pair[i] for pair in found.values()) for i in (0, 1))
        lines.append(f"| {words} | {' | '.join(cells)} | {ours:.4g} against {other:.4g} ms, {times(other / ours)} |")
    return lines


def tables(folder: Path) -> str:
    """README's two tables of the result files in `folder`, one chip's."""
    results = {
        file.stem: {case["name"]: case for case in record.read(file)["cases"]}
        for file in sorted(folder.glob("*.json"))
        if file.stem in {"train_step", *(row[1] for row in ROWS)}
    }
    return "\n".join([*ops_table(results), "", *steps_table(results)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="results of one chip")
    print(tables(parser.parse_args().folder))


if __name__ == "__main__":
    main()
