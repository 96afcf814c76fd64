"""generate, generate_text and load_run: against the uncached model, beyond block_size, as whole characters, and errors."""

import codecs
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastgpt.errors import UserError
from fastgpt.infer import generate, generate_text, load_run, sample_logits
from fastgpt.model import GPT, GPTConfig, save_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose a lot to them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(**changes) -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "init": "he"} | changes
    return GPT(GPTConfig(**shape))


@torch.no_grad()
def uncached(model: GPT, prompt: list[int], n: int, temperature: float, seed: int = 0) -> list[int]:
    """The documented procedure without a cache: a full window starts again from its last block_size // 2 tokens."""
    model.eval()
    block_size = model.config.block_size
    generator = torch.Generator().manual_seed(seed)
    context, window = list(prompt), prompt[-block_size:]
    for _ in range(n):
        if len(window) > block_size:
            window = context[-max(1, block_size // 2) :]
        logits = model(torch.tensor([window]), all_logits=True)[0][:, -1]
        token = int(sample_logits(logits, temperature, 20, 0.9, generator))
        context.append(token)
        window = [*window, token]
    return context[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("prompt_tokens", [1, 7, 15, 16, 17, 40])
@pytest.mark.parametrize("block_size", [16, 7, 2, 1])
def test_is_the_uncached_model_also_beyond_block_size(block_size: int, prompt_tokens: int, temperature: float) -> None:
    model = build(block_size=block_size)
    prompt = torch.randint(61, (prompt_tokens,)).tolist()
    got = list(generate(model, prompt, 50, temperature=temperature, top_k=20, top_p=0.9, seed=3))
    assert got == uncached(model, prompt, 50, temperature, seed=3)


def test_a_seed_repeats_and_torch_s_generator_is_left_alone() -> None:
    model = build()
    before = torch.get_rng_state()
    first, again, other = (list(generate(model, [1], 40, seed=seed)) for seed in (7, 7, 8))
    assert first == again != other
    assert list(generate(model, [1], 40)) != list(generate(model, [1], 40))
    assert torch.equal(torch.get_rng_state(), before)


def test_prompts_as_lists_and_tensors() -> None:
    model = build()
    want = list(generate(model, [3, 5], 10, seed=0))
    for prompt in ((3, 5), torch.tensor([3, 5]), torch.tensor([[3, 5]], dtype=torch.int32)):
        assert list(generate(model, prompt, 10, seed=0)) == want


def test_stop_ids_end_it_and_are_not_yielded() -> None:
    model = build()
    free = list(generate(model, [1], 30, seed=0))
    stop = free[12]
    assert (
        list(generate(model, [1], 30, seed=0, stop_ids=[stop, 60]))
        == free[: min(free.index(stop), [*free, 60].index(60))]
    )


def test_n_vocab_shuts_out_the_padding() -> None:
    model = build()
    ids = list(generate(model, [1], 200, temperature=3.0, top_k=None, top_p=None, seed=0, n_vocab=5))
    assert set(ids) == set(range(5))


def test_the_model_s_mode_comes_back_and_none_leaks_to_the_caller() -> None:
    model = build(dropout=0.5).train()
    steps = generate(model, [1], 10, seed=0)
    assert model.training
    for _ in range(3):
        next(steps)
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        assert not model.training
    steps.close()
    assert model.training
    assert list(generate(model, [1], 10, seed=0)) == list(generate(model.eval(), [1], 10, seed=0))
    assert not model.training


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        ([], {}, "ids: the prompt holds no token"),
        ([1, 61], {}, "ids: token id 61 at position 1; accepted: 0 to 60"),
        ([-1], {}, "ids: token id -1 at position 0"),
        ([5], {"n_vocab": 5}, "ids: token id 5 at position 0; accepted: 0 to 4"),
        ([1], {"n_vocab": 62}, "n_vocab: got 62; accepted: 1 to the model's vocab_size = 61"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens: got -1"),
        ([1], {"max_new_tokens": 2.5}, "max_new_tokens: got 2.5"),
        ([1], {"temperature": -0.1}, "temperature: got -0.1"),
        ([1], {"top_k": -2}, "top_k: got -2"),
        ([1], {"top_p": 0.0}, "top_p: got 0.0"),
    ],
)
def test_bad_input_is_named_before_the_first_token(ids: list[int], arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(build(), ids, **{"max_new_tokens": 5} | arguments)


class Bytes:
    """A tokenizer of single bytes and an end-of-text token: most characters of its texts lie across tokens."""

    n_vocab = 257
    eot_token: int | None = 256

    def encode(self, text: str) -> list[int]:
        if "\0" in text:
            raise ValueError("character '\\x00' is not in the vocabulary")
        return list(text.encode())

    def stream_decoder(self) -> "Bytes.Decoder":
        return Bytes.Decoder()

    class Decoder:
        def __init__(self) -> None:
            self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def push(self, id: int) -> str:
            return self.decoder.decode(bytes([id]))

        def finish(self) -> str:
            return self.decoder.decode(b"", final=True)


class Parrot(GPT):
    """A GPT that follows a fixed text whatever the weights say, so that the stream's contents are known."""

    script: list[int]

    def forward(self, idx, targets=None, cache=None, *, all_logits=False):
        start = cache.length
        super().forward(idx, targets, cache, all_logits=all_logits)
        logits = torch.full((1, 1, self.config.vocab_size), -50.0)
        logits[0, 0, self.script[start + idx.shape[1] - 1]] = 50.0
        return logits, None


def parrot(text: str, end: int = 256) -> Parrot:
    model = Parrot(GPTConfig(vocab_size=257, block_size=128, n_layer=1, n_head=1, n_embd=8))
    model.script = [*text.encode(), end]
    return model


def test_text_streams_in_whole_characters_and_stops_at_the_end_of_text() -> None:
    text = "naïve café, 東京 🦜 end"
    pieces = list(generate_text(parrot(text), Bytes(), "", 100, seed=0))
    assert "".join(pieces) == text
    assert pieces == list(text)  # each character as soon as its last byte is there


def test_a_character_cut_off_by_the_limit_is_finished_once() -> None:
    assert list(generate_text(parrot("a東"), Bytes(), "", 3, seed=0)) == ["a", "\ufffd"]


def test_stop_ids_may_be_chosen() -> None:
    assert "".join(generate_text(parrot("one. two."), Bytes(), "", 100, stop_ids=[ord(".")])) == "one"


def test_the_prompt_is_read_and_not_repeated() -> None:
    model = build(vocab_size=257)
    got = "".join(generate_text(model, Bytes(), "Hello", 9, seed=1))
    ids = list(generate(model, list(b"Hello"), 9, seed=1, stop_ids=[256]))
    assert got == bytes(ids).decode(errors="replace")


def test_an_empty_prompt_starts_from_end_of_text_or_a_line_break_or_token_0() -> None:
    class NoEnd(Bytes):
        n_vocab = 256
        eot_token = None

    class NoLineBreak(NoEnd):
        def encode(self, text: str) -> list[int]:
            raise ValueError("character '\\n' is not in the vocabulary")

    model = build(vocab_size=257)
    for tokenizer, start in ((Bytes(), 256), (NoEnd(), 10), (NoLineBreak(), 0)):
        want = list(generate(model, [start], 12, seed=4, stop_ids=[256], n_vocab=tokenizer.n_vocab))
        assert "".join(generate_text(model, tokenizer, "", 12, seed=4)) == bytes(want).decode(errors="replace")


def test_text_errors_are_named_before_the_first_piece() -> None:
    with pytest.raises(UserError, match=r"prompt: character '\\x00' is not in the vocabulary"):
        generate_text(build(vocab_size=257), Bytes(), "a\0b")
    with pytest.raises(UserError, match="tokenizer: has 257 tokens and the model 61"):
        generate_text(build(), Bytes(), "a")
    with pytest.raises(UserError, match="temperature: got -1"):
        generate_text(build(vocab_size=257), Bytes(), "a", temperature=-1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training leaves it, in what load_run reads."""
    from fastgpt.tokenizer import CharTokenizer

    tokenizer = CharTokenizer.train("the quick brown fox\n")
    tokenizer.save(tmp_path / "tokenizer.json")
    save_model(build(vocab_size=tokenizer.n_vocab), tmp_path / "model.safetensors")
    return tmp_path


def test_load_run_gives_what_was_saved(run: Path) -> None:
    model, tokenizer = load_run(run)
    assert model.config.vocab_size == tokenizer.n_vocab
    assert not model.training
    want = build(vocab_size=tokenizer.n_vocab)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want.parameters(), strict=True))
    text = "".join(generate_text(model, tokenizer, "the", 20, seed=0))
    assert len(text) == 20
    assert set(text) <= set("the quick brown fox\n")
    with pytest.raises(UserError, match="prompt: "):
        generate_text(model, tokenizer, "ZEBRA")


def test_load_run_names_what_is_wrong(run: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_run(run / "nowhere")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a folder"):
        load_run(run / "tokenizer.json")
    tokenizer = (run / "tokenizer.json").read_bytes()
    (run / "tokenizer.json").write_bytes(tokenizer[: len(tokenizer) // 2])
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_run(run)
    (run / "tokenizer.json").write_bytes(tokenizer)
    save_model(build(vocab_size=3), run / "model.safetensors")
    with pytest.raises(UserError, match=r"tokenizer\.json has 17 tokens and model\.safetensors only 3"):
        load_run(run)
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors: training has not saved a model yet"):
        load_run(run)
    (run / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json: it is not a run folder"):
        load_run(run)
