"""GPTConfig: what it accepts, what it names when it does not, and its way through JSON and YAML."""

import dataclasses
import json

import pytest
import yaml

from fastgpt.errors import UserError
from fastgpt.model import GPTConfig

SHAPE = {"vocab_size": 65, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}


def test_defaults() -> None:
    config = GPTConfig(**SHAPE)
    assert (config.kv_heads, config.head_dim) == (4, 32)
    assert (config.dropout, config.bias, config.activation, config.init) == (0.0, True, "gelu_tanh", "gpt2")


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_head": 2, "dropout": 0.1, "bias": False, "activation": "relu", "init": "he"}]
)
def test_survives_json_and_yaml(changes: dict) -> None:
    config = GPTConfig(**SHAPE | changes)
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert GPTConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(GPTConfig)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: got 0; accepted: a whole number of at least 1"),
        ({"block_size": -1}, "block_size: got -1"),
        ({"n_layer": 2.0}, "n_layer: got 2.0"),
        ({"n_layer": "4"}, "n_layer: got '4'"),
        ({"n_layer": True}, "n_layer: got True"),
        ({"n_embd": None}, "n_embd: got None"),
        ({"n_head": 3}, "n_head: got 3; n_embd = 128 must be a multiple of it"),
        ({"n_kv_head": 3}, "n_kv_head: got 3; n_head = 4 must be a multiple of it"),
        ({"n_kv_head": 8}, "n_kv_head: got 8"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"dropout": -0.1}, "dropout: got -0.1"),
        ({"dropout": float("nan")}, "dropout: got nan"),
        ({"dropout": "0.1"}, "dropout: got '0.1'"),
        ({"bias": 1}, "bias: got 1; accepted: true or false"),
        ({"activation": "gelu_tan"}, "activation: got 'gelu_tan'; accepted: relu, .*did you mean 'gelu_tanh'"),
        ({"activation": None}, "activation: got None"),
        ({"activation": ["relu"]}, "activation: got"),
        ({"init": "xaviar"}, "init: got 'xaviar'; accepted: gpt2, .*did you mean 'xavier'"),
    ],
)
def test_a_value_that_does_not_fit_is_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GPTConfig(**SHAPE | changes)


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown model key 'n_layers'; did you mean 'n_layer'"):
        GPTConfig.from_dict(SHAPE | {"n_layers": 3})


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match="'n_embd' is missing"):
        GPTConfig.from_dict({key: value for key, value in SHAPE.items() if key != "n_embd"})
