"""README's table of the tokenizer is what its result file says."""

import json

import pytest
from paths import ROOT

from fastgpt.benchmarks import bench_tokenizer


def test_readme_has_the_table_of_the_result_file() -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*/tokenizer.json"))
    if not files:
        pytest.skip("needs benchmarks/results")
    tables = [bench_tokenizer.table(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert any(table in readme for table in tables), (
        "run python -m benchmarks.bench_tokenizer --table on the result file"
    )


def test_table_leaves_out_ids_that_differ() -> None:
    variants = [
        {"name": "fastgpt", "value": 400.0, "median_ms": 10.0, "exact": True},
        {"name": "tiktoken", "value": 10.0, "median_ms": 400.0, "exact": True},
        {"name": "gigatoken", "value": 800.0, "median_ms": 5.0, "exact": True},
        {"name": "fastokens", "value": 40.0, "median_ms": 100.0, "exact": False},
    ]
    case = {"name": "cl100k_base en batch to NumPy, warm", "unit": "MB/s", "variants": variants}
    *_, line = bench_tokenizer.table({"cases": [case]}).splitlines()
    assert line == "| cl100k_base en batch to NumPy, warm | 400 MB/s | 40 x | 0.5 x |  |"
