"""The configuration: layers, types, limits, unknown keys, presets, and the agreement with what the model accepts."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.errors import UserError
from fastgpt.train.config import (
    DEFAULT_TIME_BUDGET_S,
    Config,
    ModelConfig,
    apply,
    convert,
    load_config,
    options,
    preset_names,
    read_yaml,
)


def test_layers_go_over_one_another(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model:\n  n_layer: 3\n  n_head: 8\ntrain:\n  learning_rate: 3e-4\n")
    config = load_config(preset="shakespeare-char-cpu", file=file, overrides={"model.n_head": "2"})
    assert config.model.n_embd == 128  # preset
    assert config.model.n_layer == 3  # file over preset
    assert config.train.learning_rate == 3e-4  # 3e-4 is text for YAML 1.1
    assert config.model.n_head == 2  # override over file


def test_defaults_are_a_time_budget():
    train = load_config().train
    assert (train.max_steps, train.epochs, train.time_budget_s) == (None, None, DEFAULT_TIME_BUDGET_S)


@pytest.mark.parametrize(
    ("key", "text", "value"), [("max_steps", "7", 7), ("epochs", "2", 2.0), ("time_budget_s", "9", 9.0)]
)
def test_a_later_length_replaces_an_earlier_one(key, text, value):
    train = load_config(preset="shakespeare-char-cpu", overrides={f"train.{key}": text}).train
    expected = {"max_steps": None, "epochs": None, "time_budget_s": None} | {key: value}
    assert {name: getattr(train, name) for name in expected} == expected


def test_two_lengths_in_one_layer_are_refused():
    with pytest.raises(UserError, match=r"train\.max_steps and train\.epochs are both given"):
        load_config(overrides={"train.max_steps": "3", "train.epochs": "1"})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.max_step", "train.max_steps"),
        ("train.lerning_rate", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("train.dropout", "model.dropout"),
        ("modle.n_layer", "model.n_layer"),
    ],
)
def test_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(UserError, match=f"unknown option '{key}'; did you mean '{nearest}'"):
        load_config(overrides={key: "1"})


def test_unknown_key_far_from_all_gets_no_guess():
    with pytest.raises(UserError) as caught:
        load_config(overrides={"train.zzzzqqq": "1"})
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("train.max_steps", "many", "a whole number or none"),
        ("train.max_steps", "0", "at least 1"),
        ("train.max_steps", "2.5", "a whole number"),
        ("train.learning_rate", "fast", "a number"),
        ("train.learning_rate", "0", "above 0"),
        ("train.learning_rate", "nan", "finite"),
        ("train.learning_rate", "inf", "finite"),
        ("model.dropout", "1", "below 1"),
        ("model.bias", "maybe", "true or false"),
        ("model.bias", "1", "true or false"),
        ("train.batch_size", "true", "a whole number"),
        ("train.dtype", "float16", "auto, float32, bfloat16"),
        ("tokenizer.type", "words", "bpe, char"),
        ("data.val_fraction", "0.9", "at most 0.5"),
    ],
)
def test_wrong_values_name_key_got_and_accepted(key, text, words):
    with pytest.raises(UserError) as caught:
        load_config(overrides={key: text})
    message = str(caught.value)
    assert key in message
    assert repr(text) in message
    assert words in message


def test_min_lr_above_the_peak_is_refused():
    with pytest.raises(UserError, match=r"train\.min_lr"):
        load_config(overrides={"train.learning_rate": "1e-4", "train.min_lr": "1e-3"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [1, 2]\n", "section 'model' holds"),
        ("modell:\n  n_layer: 2\n", "unknown section 'modell'; did you mean 'model'"),
        ("n_layer: 2\n", "did you mean 'model.n_layer'"),
        ("- a\n", "holds list"),
        ("a: b: c\n", "is not YAML (line 1)"),
        ("model:\n  n_layer: two\n", "model.n_layer is 'two'"),
        ("model:\n  n_layers: 2\n", "did you mean 'model.n_layer'"),
    ],
)
def test_bad_yaml(tmp_path, text, words):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file=file)
    assert words in str(caught.value)


def test_missing_yaml(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_config(file=tmp_path / "no.yaml")


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'shakespeare-char-cpu'"):
        load_config(preset="shakespeare-char-cpus")


def _same_as_reloaded(config, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    again = Config()
    apply(again, read_yaml(file))
    return again == config


@pytest.mark.parametrize("name", [None, *preset_names()])
def test_what_is_written_loads_again(name, tmp_path):
    assert _same_as_reloaded(load_config(preset=name), tmp_path)


@settings(deadline=None)
@given(prompt=st.text(max_size=20), rate=st.floats(1e-12, 1e3), seed=st.integers(0, 2**63 - 1))
def test_any_value_survives_yaml(tmp_path_factory, prompt, rate, seed):
    config = load_config()
    config.train.sample_prompt, config.train.learning_rate, config.train.seed = prompt, rate, seed
    assert _same_as_reloaded(config, tmp_path_factory.mktemp("yaml"))


@pytest.mark.parametrize("name", [None, *preset_names()])
def test_defaults_and_presets_are_valid_one_by_one(name):
    config = load_config(preset=name)
    for key, _ in options():
        section, field = key.split(".")
        value = getattr(getattr(config, section), field)
        assert convert(key, value) == value


@pytest.mark.parametrize("name", [None, *preset_names()])
def test_the_model_accepts_defaults_and_presets(name):
    from fastgpt.model import GPTConfig

    GPTConfig(vocab_size=65, **dataclasses.asdict(load_config(preset=name).model))


def test_the_model_section_has_the_models_fields():
    from fastgpt.model import GPTConfig

    here = {field.name for field in dataclasses.fields(ModelConfig)}
    there = {field.name for field in dataclasses.fields(GPTConfig)}
    # the tokenizer's, and what only other libraries' models set
    assert there - here == {"vocab_size", "qkv_bias", "mlp_bias", "norm_bias", "norm_eps", "rope_scaling"}
    assert here <= there


def test_the_cpu_preset_is_nanogpts():
    config = load_config(preset="shakespeare-char-cpu")
    model, train = config.model, config.train
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size, model.dropout) == (4, 4, 128, 64, 0.0)
    assert (train.batch_size, train.max_steps, train.learning_rate, train.min_lr) == (12, 2000, 1e-3, 1e-4)
    assert (train.warmup_steps, train.beta1, train.beta2, train.weight_decay) == (100, 0.9, 0.99, 0.1)
    assert (train.grad_clip, train.eval_interval, train.grad_accum_steps) == (1.0, 250, 1)
    assert (config.tokenizer.type, config.data.val_fraction) == ("char", 0.1)
