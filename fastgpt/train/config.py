"""The configuration of a training run: four dataclasses, one for each section of config.yaml.

    data       which text, and how much of it is held out
    tokenizer  the kind and size of the vocabulary
    model      the shape of the GPT (the fields of `fastgpt.model.GPTConfig` except vocab_size, which the tokenizer decides)
    train      the optimizer, the schedule, the length, evaluation, device and number format

Values come in layers, each over the one before: the defaults below, a preset (`presets/NAME.yaml`), a YAML file, dotted overrides
(`train.max_steps` = 500). Every layer is checked: an unknown key is an error that names the nearest right one, a value of the wrong
type or out of range is an error that says what is accepted. This file knows neither torch nor the model, so `--help` stays fast.

The three lengths of a run, `train.max_steps`, `train.epochs` and `train.time_budget_s`, exclude each other; a layer that sets one
replaces what the layers before it chose. Nothing set means a time budget of DEFAULT_TIME_BUDGET_S seconds.
"""

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastgpt.errors import UserError
from fastgpt.train.track import tracker_names

DEFAULT_TIME_BUDGET_S = 170.0
LENGTHS = ("max_steps", "epochs", "time_budget_s")
PRESETS = Path(__file__).with_name("presets")


def option(default: Any, text: str, **limits: Any) -> Any:
    """A dataclass field with its help text and limits: choices, at_least, above, at_most, below."""
    return field(default=default, metadata={"help": text, **limits})


@dataclass
class DataConfig:
    """Which text to learn from."""

    source: str = option(
        "stdlib", "the text: 'stdlib' (Python's standard library), 'shakespeare' (downloaded once), a file or a folder"
    )
    val_fraction: float = option(0.1, "share of the text held out for validation", above=0.0, at_most=0.5)
    order: str = option(
        "shuffle",
        "how training text is drawn: each block once an epoch in a shuffled order, or crops at random places",
        choices=("shuffle", "random"),
    )


@dataclass
class TokenizerConfig:
    """How text becomes token ids."""

    type: str = option("bpe", "kind of tokenizer: byte-level BPE or one token a character", choices=("bpe", "char"))
    vocab_size: int = option(2048, "size of the BPE vocabulary, special tokens included", at_least=257, at_most=2**31)
    pattern: str = option("gpt2", "BPE pre-tokenizer: the name of a known pattern, or a regular expression")
    path: str | None = option(None, "use this saved tokenizer.json instead of training one")


@dataclass
class ModelConfig:
    """The shape of the GPT; see fastgpt.model.GPTConfig for what each field means to the model."""

    block_size: int = option(128, "longest context in tokens", at_least=1)
    n_layer: int = option(4, "number of transformer blocks", at_least=1)
    n_head: int = option(3, "number of attention heads", at_least=1)
    n_kv_head: int | None = option(None, "number of key/value heads (none: as many as n_head)", at_least=1)
    n_embd: int = option(192, "width of the residual stream", at_least=1)
    dropout: float = option(0.0, "dropout probability while training", at_least=0.0, below=1.0)
    bias: bool = option(False, "biases in the linear and layer-norm layers")
    activation: str = option(
        "gelu_tanh",
        "activation of the MLP: relu, sigmoid, tanh, gelu (erf), gelu_tanh, silu; gated: swiglu, geglu, geglu_tanh",
    )
    n_hidden: int | None = option(
        None, "width inside the MLP (none: four times the stream's, less where gated)", at_least=1
    )
    norm: str = option("layer_norm", "the norms", choices=("layer_norm", "rms_norm"))
    position: str = option("learned", "learned positions, or rotary ones", choices=("learned", "rope"))
    rope_theta: float = option(10000.0, "base of the rotary angles", at_least=1.0)
    tied_head: bool = option(True, "whether the head is the token embedding")
    init: str = option("gpt2", "scheme of the first weights: gpt2, normal, zeros, xavier or he")


@dataclass
class TrainConfig:
    """How the model is trained."""

    batch_size: int = option(8, "sequences in one forward pass, of all processes together", at_least=1)
    grad_accum_steps: int = option(1, "forward and backward passes for one optimizer step", at_least=1)
    max_steps: int | None = option(None, "length of the run in optimizer steps", at_least=1)
    epochs: float | None = option(None, "length of the run in passes over the training text", above=0.0)
    time_budget_s: float | None = option(
        None, f"length of the run in seconds (none of the three lengths given: {DEFAULT_TIME_BUDGET_S:g})", above=0.0
    )
    learning_rate: float = option(3e-3, "peak learning rate", above=0.0)
    min_lr: float | None = option(
        None, "learning rate at the end of the cosine (none: a tenth of the peak)", at_least=0.0
    )
    warmup_steps: int = option(100, "steps of linear warm-up", at_least=0)
    weight_decay: float = option(0.1, "decoupled weight decay, on matrices only", at_least=0.0)
    beta1: float = option(0.9, "AdamW's first moment decay", at_least=0.0, below=1.0)
    beta2: float = option(0.99, "AdamW's second moment decay", at_least=0.0, below=1.0)
    grad_clip: float = option(1.0, "largest norm of the gradient (0: no clipping)", at_least=0.0)
    eval_interval: int | None = option(None, "steps between evaluations (none: about a tenth of the run)", at_least=1)
    eval_tokens: int = option(16384, "tokens of each split read by an evaluation during training", at_least=1)
    final_eval_tokens: int = option(131072, "validation tokens read by the evaluation at the end", at_least=1)
    patience: int = option(
        5, "stop after this many evaluations in a row without a better validation loss (0: never)", at_least=0
    )
    checkpoint_interval: int | None = option(None, "steps between checkpoints (none: at each evaluation)", at_least=1)
    seed: int = option(1337, "seed of the weights, the order of the text and dropout", at_least=0, at_most=2**63 - 1)
    device: str = option("auto", "where to train: 'auto', 'cpu', 'cuda' or 'cuda:N'")
    dtype: str = option(
        "auto",
        "number format of the matrix products (auto: bfloat16 where the chip has instructions for it)",
        choices=("auto", "float32", "bfloat16"),
    )
    parallel: str = option(
        "ddp",
        "what the processes of torchrun share: gradients (ddp), or weights, gradients and moments, each a part (fsdp)",
        choices=("ddp", "fsdp"),
    )
    activation_checkpointing: bool = option(
        False,
        "keep each block's input alone and compute the block again in the backward pass: less memory, a third more work",
    )
    matmul_precision: str = option("highest", "torch's float32 matmul precision", choices=("highest", "high", "medium"))
    threads: int = option(0, "threads for the CPU (0: torch's own choice)", at_least=0)
    track: str = option("", "also send the measurements to tensorboard, trackio or wandb; several with commas")
    sample_prompt: str = option("", "prompt of the sample at the end (empty: the start of a text)")
    sample_tokens: int = option(200, "length of the sample at the end (0: no sample)", at_least=0)


@dataclass
class Config:
    """A whole run. `Config()` is what `fastgpt train` uses with nothing given.

    Example:
        >>> config = load_config(preset="shakespeare-char-cpu", overrides={"train.max_steps": "100"})
        >>> config.train.max_steps, config.model.n_embd
        (100, 128)
    """

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested dictionaries, in the order of the dataclasses."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The text of config.yaml."""
        # ASCII with escapes: PyYAML folds an unescaped U+0085 in text to a line end when it reads it back
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def sections() -> dict[str, type]:
    """Section name -> its dataclass."""
    return dict(typing.get_type_hints(Config))


def options() -> Iterator[tuple[str, dataclasses.Field]]:
    """Every option as (dotted key, dataclass field), in order."""
    for section, kind in sections().items():
        for item in dataclasses.fields(kind):
            yield f"{section}.{item.name}", item


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name nearest to `name`, or an empty string where none is near."""
    known = list(known)
    last = {item.rsplit(".", 1)[-1]: item for item in reversed(known)}
    leaf = name.rsplit(".", 1)[-1]
    if leaf in last:  # the right name in the wrong section, or without one
        return f"; did you mean {last[leaf]!r}?"
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    found = found or [last[near] for near in difflib.get_close_matches(leaf, last, n=1, cutoff=0.6)]
    return f"; did you mean {found[0]!r}?" if found else ""


def _parse(text: str) -> Any:
    """The value of a command-line override: YAML's scalars; text that is not YAML stays text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def convert(key: str, value: Any, *, from_text: bool = False) -> Any:
    """Check `value` against the option `key` and return it in the option's own type.

    Args:
        key: dotted name, such as "train.max_steps".
        value: what was given; with from_text the string of the command line.

    Raises:
        UserError: the key is unknown, or the value has the wrong type or is out of range.
    """
    known = dict(options())
    if key not in known:
        raise UserError(f"unknown option {key!r}{nearest(key, known)}")
    section, name = key.split(".")
    hint = typing.get_type_hints(sections()[section])[name]
    return convert_value(key, value, hint, known[key].metadata, from_text=from_text)


def convert_value(key: str, value: Any, hint: Any, limits: Mapping[str, Any], *, from_text: bool = False) -> Any:
    """Check `value` against a type and the limits of its `option`, and return it in that type.

    Args:
        key: its name in messages.
        value: what was given; with from_text the string of the command line.
        hint: bool, int, float or str, or one of them | None.
        limits: the metadata of an `option`.

    Raises:
        UserError: the wrong type or out of range.
    """
    optional = isinstance(hint, types.UnionType)
    kind = next(arg for arg in typing.get_args(hint) if arg is not type(None)) if optional else hint
    accepted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    accepted += " or none" if optional else ""

    given = value
    if from_text and kind is not str:
        value = _parse(value)
    if optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))):
        return None
    if kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-3 as text because it has no dot
            value = float(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{key} is {given!r}; accepted is {accepted}")

    if "choices" in limits and value not in limits["choices"]:
        raise UserError(f"{key} is {given!r}; accepted is one of {', '.join(limits['choices'])}")
    if (kind is float and value != value) or value in (float("inf"), float("-inf")):
        raise UserError(f"{key} is {given!r}; accepted is a finite number")
    for limit, words, holds in (
        ("at_least", "at least", lambda x, y: x >= y),
        ("above", "above", lambda x, y: x > y),
        ("at_most", "at most", lambda x, y: x <= y),
        ("below", "below", lambda x, y: x < y),
    ):
        if limit in limits and not holds(value, limits[limit]):
            raise UserError(f"{key} is {given!r}; accepted is {accepted} {words} {limits[limit]}")
    return value


def apply(config: Config, layer: Mapping[str, Any], *, from_text: bool = False) -> None:
    """Put one layer of dotted values over `config`, in place."""
    lengths = [name for name in LENGTHS if layer.get(f"train.{name}") not in (None, "none")]
    if len(lengths) > 1:
        given = " and ".join(f"train.{name}" for name in lengths)
        raise UserError(
            f"{given} are both given; a run has one length: train.max_steps, train.epochs or train.time_budget_s"
        )
    values = {key: convert(key, value, from_text=from_text) for key, value in layer.items()}
    if lengths:
        for name in LENGTHS:
            setattr(config.train, name, None)
    for key, value in values.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)


def check(config: Config) -> None:
    """Rules that involve more than one value; those of the model itself are the model's (`GPTConfig`)."""
    train = config.train
    if train.min_lr is not None and train.min_lr > train.learning_rate:
        raise UserError(
            f"train.min_lr is {train.min_lr:g}; accepted is at most train.learning_rate ({train.learning_rate:g})"
        )
    tracker_names(train.track)
    if not config.data.source:
        raise UserError("data.source is empty; accepted is 'stdlib', 'shakespeare', a file or a folder")


def read_yaml(path: Path, what: str = "configuration") -> dict[str, Any]:
    """The dotted values of a YAML file with the sections data, tokenizer, model and train."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"the {what} {path} is not YAML{line}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(
            f"the {what} {path} holds {type(tree).__name__}; accepted are sections: {', '.join(sections())}"
        )
    layer: dict[str, Any] = {}
    for section, values in tree.items():
        if section not in sections():
            hint = nearest(str(section), [*sections(), *(key for key, _ in options())])
            raise UserError(f"{path}: unknown section {section!r}{hint}")
        if not isinstance(values, dict | None):
            raise UserError(f"{path}: section {section!r} holds {values!r}; accepted are key: value lines")
        layer.update({f"{section}.{name}": value for name, value in (values or {}).items()})
    return layer


def preset_names() -> list[str]:
    """The names that `--preset` accepts."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """The dotted values of a preset; raises UserError with the nearest name for an unknown one."""
    if name not in preset_names():
        raise UserError(
            f"unknown preset {name!r}{nearest(name, preset_names())}; there are: {', '.join(preset_names())}"
        )
    return read_yaml(PRESETS / f"{name}.yaml", "preset")


def load_config(
    *, preset: str | None = None, file: str | Path | None = None, overrides: Mapping[str, str] | None = None
) -> Config:
    """Defaults, then a preset, then a YAML file, then overrides (dotted key -> text of the command line).

    Raises:
        UserError: an unknown preset, file, key or value; the message names the nearest right one.
    """
    config = Config()
    if preset is not None:
        apply(config, read_preset(preset))
    if file is not None:
        apply(config, read_yaml(Path(file)))
    if overrides:
        apply(config, overrides, from_text=True)
    if all(getattr(config.train, name) is None for name in LENGTHS):
        config.train.time_budget_s = DEFAULT_TIME_BUDGET_S
    check(config)
    return config
