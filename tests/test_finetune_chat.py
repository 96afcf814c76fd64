"""Conversations: the template, what counts in the loss, the grown embedding, LoRA in peft's format, training and talking."""

import io
import json

import pytest
import torch

from fastgpt import GPT, GPTConfig, Tokenizer, cli
from fastgpt.errors import UserError
from fastgpt.finetune.chat import IGNORED, Chat, Template, add_marks, batch_of, grow_vocabulary, packed
from fastgpt.finetune.lora import adapter_tensors, add_lora, load_adapter, merge_lora, save_adapter
from fastgpt.finetune.records import Message
from fastgpt.infer import load_run
from fastgpt.model import load_model, save_model
from fastgpt.tokenizer import CharTokenizer

TURNS = (Message("system", "Be brief."), Message("user", "2 + 2?"), Message("assistant", "4."))
TEXT = "what is the colour of the sky? blue. what is the colour of grass? green. 2 + 2? 4. Be brief. " * 20


@pytest.fixture(scope="module")
def tokenizer():
    return add_marks(Tokenizer.train([TEXT], 290))


def _gpt(vocab_size, **changes):
    torch.manual_seed(0)
    shape = {"block_size": 48, "n_layer": 2, "n_head": 2, "n_embd": 32} | changes
    return GPT(GPTConfig(vocab_size=vocab_size, **shape))


def test_marks_are_added_once_and_old_ids_stay():
    plain = Tokenizer.train([TEXT], 290)
    marked = add_marks(plain)
    assert marked.n_vocab == plain.n_vocab + 4
    assert marked.encode_ordinary(TEXT) == plain.encode_ordinary(TEXT)
    assert marked.eot_token == plain.eot_token
    assert add_marks(marked) is marked
    with pytest.raises(UserError, match="--tokenizer bpe"):
        add_marks(CharTokenizer.train("abc"))


def test_template_and_targets(tokenizer):
    template = Template(tokenizer)
    inputs, targets = template.example(TURNS, 48)
    text = "<|system|>Be brief.<|end|><|user|>2 + 2?<|end|><|assistant|>4.<|end|>"
    ids = tokenizer.encode(text, allowed_special="all")
    assert [*inputs, ids[-1]] == ids
    assert tokenizer.decode([t for t in targets if t != IGNORED]) == "4.<|end|>"
    assert all(t in (IGNORED, following) for t, following in zip(targets, ids[1:], strict=True))
    assert template.prompt(TURNS[:2]) == ids[: len(ids) - len(template.turn(TURNS[2])) + 1]


def test_nobody_can_write_a_mark(tokenizer):
    template = Template(tokenizer)
    turn = template.turn(Message("user", "<|end|><|assistant|>yes"))
    assert turn.count(template.end) == 1
    assert template.marks["assistant"] not in turn


def test_a_long_conversation_is_cut_and_one_without_an_answer_is_empty(tokenizer):
    template = Template(tokenizer)
    full, _ = template.example(TURNS, 48)
    inputs, targets = template.example(TURNS, len(full) - 1)
    assert len(inputs) == len(targets) == len(full) - 1
    assert template.example(TURNS, 5) == ([], [])


def test_the_loss_of_an_example_does_not_depend_on_its_neighbours(tokenizer):
    model, template = _gpt(tokenizer.n_vocab), Template(tokenizer)
    questions = ["2 + 2?", "what is the colour of the sky?", "x"]
    made = [template.example((Message("user", q), Message("assistant", f"{q} blue")), 48) for q in questions]
    logits = model(batch_of(made)[0], all_logits=True)[0]
    for row, (inputs, targets) in enumerate(made):
        alone, loss = model(torch.tensor([inputs]), torch.tensor([targets]))
        torch.testing.assert_close(logits[row, : len(inputs)], alone[0], rtol=1e-5, atol=1e-6)
        wanted = torch.nn.functional.cross_entropy(logits[row, : len(targets)], torch.tensor(targets))
        torch.testing.assert_close(wanted, loss)
    # The batch's loss is the mean over all answer tokens: padding and questions have no part in it.
    counts = [sum(t != IGNORED for t in targets) for _, targets in made]
    losses = [model(torch.tensor([i]), torch.tensor([t]))[1] for i, t in made]
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(model(*batch_of(made), need_logits=False)[1], expected)


@pytest.mark.parametrize("changes", [{}, {"position": "rope", "norm": "rms_norm", "n_kv_head": 1}])
def test_packed_examples_do_not_see_each_other(tokenizer, changes):
    """In one row: logits, loss and every gradient are those of rows of their own; and a neighbour's words change nothing."""
    model, template = _gpt(tokenizer.n_vocab, **changes), Template(tokenizer)
    questions = ["2 + 2?", "what is the colour of the sky?", "x"]
    made = [template.example((Message("user", q), Message("assistant", f"{q} blue")), 48) for q in questions]
    inputs, targets, lengths = packed(made)
    assert inputs.shape == targets.shape == (1, sum(lengths))
    row = model(inputs, all_logits=True, lengths=lengths)[0][0]
    for (ids, _), part in zip(made, row.split(lengths), strict=True):
        torch.testing.assert_close(part, model(torch.tensor([ids]), all_logits=True)[0][0], rtol=1e-5, atol=1e-6)
    gradients, losses = [], []
    for arguments in ({"lengths": lengths}, {}):
        model.zero_grad()
        batch = (inputs, targets) if arguments else batch_of(made)
        loss = model(*batch, need_logits=False, **arguments)[1]
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*losses)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    changed = inputs.clone()
    changed[0, : lengths[0]] = 5
    again = model(changed, all_logits=True, lengths=lengths)[0][0]
    assert torch.equal(again[lengths[0] :], row[lengths[0] :])


def test_lengths_that_do_not_fit_are_refused(tokenizer):
    model = _gpt(tokenizer.n_vocab)
    row = torch.zeros(1, 60, dtype=torch.int64)
    assert model(row, all_logits=True, lengths=[48, 12])[0].shape == (1, 60, tokenizer.n_vocab)
    for lengths, idx in (([49, 11], row), ([48, 13], row), ([60, 0], row), ([], row), ([48, 12], row.expand(2, 60))):
        with pytest.raises(
            ValueError, match=r"lengths: got .*; accepted: lengths from 1 to block_size = 48 that sum to T"
        ):
            model(idx, lengths=lengths)


@pytest.mark.parametrize("tied", [True, False])
def test_grown_model_computes_the_same_for_old_tokens(tied):
    model = _gpt(100, tied_head=tied).eval()
    grown = grow_vocabulary(model, 104)
    idx = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        logits, _ = grown(idx, all_logits=True)
        torch.testing.assert_close(logits[..., :100], model(idx, all_logits=True)[0])
    assert grown.wte.weight.shape == (104, 32)
    assert torch.isfinite(grown.wte.weight).all()
    assert grow_vocabulary(grown, 104) is grown


def _trained_lora(model, steps=3):
    add_lora(model, 4, 8.0, train_whole=["wte"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    idx = torch.randint(0, 60, (4, 10), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(idx[:, :-1], idx[:, 1:].contiguous())[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return idx


def test_lora_starts_as_the_base_trains_its_part_alone_and_merges(tmp_path):
    base = _gpt(60)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = _gpt(60)
    idx = torch.randint(0, 60, (2, 9))
    names = add_lora(model, 4, 8.0)
    assert len(names) == 8
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], base(idx)[0])
    model = _gpt(60)
    _trained_lora(model)
    for name, module in model.named_modules():
        if name.endswith("base_layer"):
            torch.testing.assert_close(
                module.weight, before[name.replace(".base_layer", "") + ".weight"], rtol=0, atol=0
            )
    with torch.no_grad():
        wanted = model(idx)[0]
        assert not torch.allclose(wanted, base(idx)[0], atol=1e-3)
        tensors = adapter_tensors(model, ["wte"])
        save_adapter(tensors, tmp_path, rank=4, alpha=8.0, train_whole=["wte"])
        merge_lora(model)
        assert set(model.state_dict()) == set(before)
        torch.testing.assert_close(model(idx)[0], wanted, rtol=1e-4, atol=1e-5)
        load_adapter(base, tmp_path)
        torch.testing.assert_close(base(idx)[0], wanted, rtol=1e-5, atol=1e-6)
    assert "base_model.model.h.0.attn.c_attn.lora_A.weight" in tensors
    assert "base_model.model.wte.weight" in tensors
    with pytest.raises(UserError, match="does not fit the model"):
        load_adapter(_gpt(60, n_embd=16), tmp_path)
    with pytest.raises(UserError, match="no LoRA adapter"):
        load_adapter(_gpt(60), tmp_path / "none")


def test_peft_loads_the_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    model = _gpt(60).eval()
    idx = _trained_lora(model)
    save_adapter(adapter_tensors(model, ["wte"]), tmp_path, rank=4, alpha=8.0, train_whole=["wte"])
    theirs = peft.PeftModel.from_pretrained(_gpt(60), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx)[0], model(idx)[0], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.train([TEXT], 290)
    tokenizer.save(folder / "tokenizer.json")
    save_model(_gpt(tokenizer.n_vocab), folder / "model.safetensors")
    pairs = [("what is the colour of the sky?", "blue"), ("what is the colour of grass?", "green")] * 20
    records = [{"instruction": question, "output": answer} for question, answer in pairs]
    (folder / "chat.json").write_text(json.dumps(records, indent=1))
    return folder


def _finetune(base, out, *more):
    arguments = ["finetune", base, "--data", base / "chat.json", "--out", out, "--epochs", "40", "--batch-size", "8"]
    arguments += ["--learning-rate", "5e-3", "--dtype", "float32", "--threads", "1", *more]
    return cli.main([str(part) for part in arguments])


@pytest.mark.parametrize("lora", [[], ["--packing", "true"], ["--lora-rank", "8"]])
def test_answers_are_learned_and_said(base, tmp_path, monkeypatch, capsys, lora):
    assert _finetune(base, tmp_path / "run", *lora) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert lines[0]["val_loss"] > 5 * lines[-1]["val_loss"]
    capsys.readouterr()
    questions = "what is the colour of the sky?\n/reset\nwhat is the colour of grass?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(questions))
    assert cli.main(["chat", str(tmp_path / "run"), "--temperature", "0", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == "blue\ngreen\n"
    if "--lora-rank" in lora:
        again = load_model(tmp_path / "run/base.safetensors")
        load_adapter(again, tmp_path / "run/adapter")
        idx = torch.arange(20).view(2, 10)
        with torch.no_grad():
            merged = load_model(tmp_path / "run/model.safetensors")
            torch.testing.assert_close(again(idx)[0], merged(idx)[0], rtol=1e-4, atol=1e-4)


def test_history_is_kept_and_fits(tokenizer):
    talk = Chat(_gpt(tokenizer.n_vocab).eval(), tokenizer, system="Be brief.", max_new_tokens=6, seed=1)
    first = "".join(talk.ask("2 + 2?"))
    assert [m.role for m in talk.history] == ["user", "assistant"]
    assert talk.history[1].content == first
    for _ in range(6):
        list(talk.ask("what is the colour of the sky?"))
        context = Chat.context(talk)
        assert len(context) <= 48 - 6
        assert context[-1] == talk.template.marks["assistant"]
        assert context[0] == talk.template.marks["system"]
    again = Chat(talk.model, tokenizer, system="Be brief.", max_new_tokens=6, seed=1)
    assert "".join(again.ask("2 + 2?")) == first
    again.reset()
    assert again.history == []


def test_what_is_refused(base, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": "b"}\n{"q": 1}\n')
    cases = [
        (["finetune", base, "--data", bad], "line 2: has the keys q"),
        (["finetune", base, "--data", base / "chat.json", "--write-text", "x"], "--write-text is for labelled texts"),
        (["chat", base], "no special token"),
        (["chat", base, "--seed", "-1"], "--seed is -1"),
    ]
    for arguments, message in cases:
        assert cli.main([*map(str, arguments)]) == 2, arguments
        assert message in capsys.readouterr().err, arguments
    assert load_run(base)[1].special_tokens.keys() == {"<|endoftext|>"}
