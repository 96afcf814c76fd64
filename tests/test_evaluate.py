"""`fastgpt evaluate`, the report of a run's losses, sample sheets, and the adapter for lm-evaluation-harness."""

import json
import math
from pathlib import Path

import pytest
import tiny_run
import torch

from fastgpt import GPT, GPTConfig, Tokenizer
from fastgpt.cli import main
from fastgpt.compat.lm_eval import Scorer, harness_model
from fastgpt.errors import UserError
from fastgpt.infer import generate, load_run
from fastgpt.infer.evaluate import evaluate_text, token_log_probs
from fastgpt.infer.sheet import sample_sheet
from fastgpt.tokenizer import CharTokenizer
from fastgpt.train.report import overfitting_report

TEXT = "anna sees the red ball. bob hears a small bird, and so on.\n" * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 290)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    torch.manual_seed(3)
    return GPT(GPTConfig(vocab_size=tokenizer.n_vocab, block_size=16, n_layer=2, n_head=2, n_embd=16, init="xavier"))


def direct(model: GPT, ids: list[int], first: int, context: int) -> list[float]:
    """The definition: each token alone, from the `context` tokens before it."""
    scores = []
    for place in range(first, len(ids)):
        logits, _ = model(torch.tensor([ids[max(0, place - context) : place]]))
        scores.append(torch.log_softmax(logits[0, -1].double(), -1)[ids[place]].item())
    return scores


@pytest.mark.parametrize(("n", "first"), [(2, 1), (16, 1), (17, 1), (18, 1), (61, 1), (61, 5), (61, 60), (40, 17)])
def test_stride_1_is_the_definition(model: GPT, n: int, first: int) -> None:
    """Every token once, in its place, from the most context there is."""
    ids = torch.randint(290, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    found, greedy = token_log_probs(model, ids, first, stride=1)
    assert found.tolist() == pytest.approx(direct(model, ids, first, 16), abs=1e-4)
    assert len(greedy) == n - first


@pytest.mark.parametrize("stride", [1, 3, 8, 15, 16])
def test_strides_give_the_context_they_promise(model: GPT, stride: int) -> None:
    """A changed token changes nothing that is more than block_size behind it, and everything just behind it."""
    ids = torch.randint(290, (70,), generator=torch.Generator().manual_seed(1))
    before, _ = token_log_probs(model, ids, stride=stride)
    assert len(before) == 69
    other = ids.clone()
    other[30] = (other[30] + 1) % 290
    after, _ = token_log_probs(model, other, stride=stride)
    changed = (before != after).nonzero().flatten() + 1  # places of the tokens
    assert changed[0] == 30
    assert changed[-1] <= 30 + 16
    assert {30 + i for i in range(1, 17 - stride + 1)} <= set(changed.tolist())


def test_evaluate_text(model: GPT, tokenizer: Tokenizer) -> None:
    found = evaluate_text(model, tokenizer, TEXT, stride=1)
    ids = [tokenizer.eot_token, *tokenizer.encode(TEXT)]
    total = -sum(direct(model, ids, 1, 16))
    assert found.tokens == len(ids) - 1
    assert found.bytes == len(TEXT.encode())
    assert found.loss == pytest.approx(total / found.tokens, abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / found.bytes, abs=1e-4)


def test_characters_leave_out_the_first() -> None:
    tokenizer = CharTokenizer.train("äbc\n")
    model = GPT(GPTConfig(vocab_size=4, block_size=4, n_layer=1, n_head=1, n_embd=4, init="zeros"))
    found = evaluate_text(model, tokenizer, "äbcbcbä\n")
    assert (found.tokens, found.bytes) == (7, 8)  # the first ä has two bytes
    assert found.loss == pytest.approx(math.log(4), abs=1e-6)
    with pytest.raises(UserError, match="too short"):
        evaluate_text(model, tokenizer, "b")
    with pytest.raises(UserError, match="cannot encode"):
        evaluate_text(model, tokenizer, "bX")


def lines(*losses: tuple[float, float]) -> list[dict[str, float]]:
    return [{"step": 10 * i, "train_loss": train, "val_loss": val} for i, (train, val) in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([(4, 4), (2, 2.1), (1, 2.4), (0.5, 2.9)], "They part at step 10.*That is overfitting"),
        ([(4, 4), (2, 2), (2.5, 2.5), (3, 3)], "both losses rose.*lower learning rate"),
        ([(4, 4), (3, 3.1), (2.5, 2.6), (2.2, 2.3)], "still falling"),
        ([(4, 4), (2, 2.05), (2, 2.0501), (2, 2.05)], "has settled"),
        ([(4, 4), (2, 2.1), (1.2, 2.0), (1.0, 1.9)], "still falling.*47% below"),
        ([(4, 4)], "too few"),
    ],
)
def test_report(losses: list[tuple[float, float]], words: str) -> None:
    import re

    assert re.search(words, " ".join(overfitting_report(lines(*losses)))), overfitting_report(lines(*losses))


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run, its report, a text in both forms, a sheet, and wrong input."""
    text, run = tiny_run.text_file(tmp_path), tmp_path / "run"
    assert main(tiny_run.arguments(text, run)) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    assert "validation loss" in capsys.readouterr().out
    assert main(["evaluate", str(run), str(text), "--json", "--stride", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    size = len(text.read_text())
    assert (found["tokens"], found["bytes"]) == (size - 1, size - 1)
    assert 1.0 < found["loss"] < 5.0
    assert main(["evaluate", str(run), str(text)]) == 0
    assert "bits per byte" in capsys.readouterr().out
    sheet = tmp_path / "sheet.md"
    options = ["--prompt", "anna", "--max-new-tokens", "5", "--sheet", str(sheet)]
    assert main(["sample", str(run), *options]) == 0
    assert sheet.read_text().count("\nanna") == 7  # greedy once, three temperatures twice
    other = tmp_path / "other.txt"
    other.write_text("XYZ")
    for arguments in (
        ["evaluate", str(run), str(other)],
        ["evaluate", str(tmp_path)],
        ["evaluate", str(run), str(text), "--stride", "99"],
    ):
        assert main(arguments) == 2
    assert "other.txt" in capsys.readouterr().err


def test_sheet_repeats(model: GPT, tokenizer: Tokenizer) -> None:
    sheets = [sample_sheet(model, tokenizer, ["anna", "```"], max_new_tokens=6, n_samples=1) for _ in range(2)]
    assert sheets[0] == sheets[1]
    assert "````text\n```" in sheets[0]  # a fence longer than the one in the text


def test_scorer(model: GPT, tokenizer: Tokenizer) -> None:
    """Against the definition: a continuation, one longer than the context, blanks that move over, a whole text."""
    scorer = Scorer(model, tokenizer)
    ids = tokenizer.encode("anna sees the red ball")
    first = len(tokenizer.encode("anna sees"))
    log_prob, greedy = scorer.score("anna sees ", "the red ball")
    assert log_prob == pytest.approx(sum(direct(model, ids, first, 16)), abs=1e-3)
    assert not greedy
    assert scorer.score("anna sees", " the red ball")[0] == log_prob
    assert scorer.score("anna", "") == (0.0, True)
    assert scorer.score("", TEXT)[0] == pytest.approx(scorer.score_text(TEXT), abs=1e-3)
    best = scorer.generate_until("anna sees", [], max_gen_toks=4)
    cut = scorer.generate_until("anna sees", [best[2:4]], max_gen_toks=4)
    assert cut == best[: best.index(best[2:4])]


def test_greedy_is_what_greedy_decoding_gives(model: GPT) -> None:
    prompt = [7, 100, 30]
    ids = prompt + list(generate(model, prompt, 9, temperature=0.0))
    assert token_log_probs(model, ids, 3, stride=16)[1].all()
    ids[5] = (ids[5] + 1) % 290
    assert token_log_probs(model, ids, 3, stride=16)[1].tolist()[:3] == [True, True, False]


def test_harness(tmp_path: Path) -> None:
    """The harness's own class and requests."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

    run = tmp_path / "run"
    assert main(tiny_run.arguments(tiny_run.text_file(tmp_path), run)) == 0
    lm = harness_model(run)
    assert isinstance(lm, LM)

    def requests(kind: str, *arguments: tuple) -> list[Instance]:
        return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]

    found = lm.loglikelihood(requests("loglikelihood", ("anna sees", " the"), ("bob", " hears")))
    assert all(log_prob < 0 and isinstance(greedy, bool) for log_prob, greedy in found)
    (rolling,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("anna sees the red ball.",)))
    assert rolling < found[0][0]
    (text,) = lm.generate_until(requests("generate_until", ("anna", {"until": ["\n"], "max_gen_toks": 8})))
    assert len(text) <= 8
    assert "\n" not in text


TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: gold\n"
    "target_delimiter: ''\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    "whole": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]\n",
}


def test_the_harness_runs_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own evaluation of tasks over a local file, its numbers against ours."""
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    run = tmp_path / "run"
    assert main(tiny_run.arguments(tiny_run.text_file(tmp_path), run, train__max_steps=60)) == 0
    text = "anna sees the red ball."
    documents = [{"q": "anna sees", "choices": [" the red ball", " ddd lll hhh"], "gold": 0, "text": text}] * 2
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, documents)))
    where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'd.jsonl'}}}}}\ntest_split: test\n"
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{where}{task}")
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = harness_model(run)
    found = lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["results"]
    assert found["choices"]["acc,none"] == 1.0
    ours = Scorer(*load_run(run)).score_text(text)
    assert found["whole"]["bits_per_byte,none"] == pytest.approx(-ours / math.log(2) / len(text))


def test_harness_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match="pip install lm-eval"):
        harness_model("nowhere")
