"""fastgpt.nn's drop-in modules against torch.nn's: values, gradients, arguments, state_dicts, and what goes to torch."""

import copy
import logging

import pytest
import torch

from fastgpt import nn
from fastgpt.nn import fallback

# Ours, and torch's of the same name, with the arguments both get.
POINTWISE = [
    ("ReLU", {}),
    ("Sigmoid", {}),
    ("Tanh", {}),
    ("GELU", {}),
    ("GELU", {"approximate": "tanh"}),
    ("SiLU", {}),
    ("Softmax", {"dim": -1}),
    ("Softmax", {"dim": 1}),
    ("LogSoftmax", {"dim": -1}),
    ("LogSoftmax", {"dim": 1}),
    ("LayerNorm", {"normalized_shape": 48}),
    ("LayerNorm", {"normalized_shape": (5, 48), "eps": 1e-3}),
    ("LayerNorm", {"normalized_shape": 48, "bias": False}),
    ("LayerNorm", {"normalized_shape": 48, "elementwise_affine": False}),
    ("RMSNorm", {"normalized_shape": 48}),
    ("RMSNorm", {"normalized_shape": (5, 48), "eps": 1e-3}),
    ("RMSNorm", {"normalized_shape": 48, "elementwise_affine": False}),
]


def pair(name: str, arguments: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(ours, torch's) with the same random parameters."""
    ours, theirs = getattr(nn, name)(**arguments), getattr(torch.nn, name)(**arguments)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """The output, the input's gradient and the parameters' gradients, in fp64."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(grad.to(y.dtype))
    return [t.detach().double() for t in (y, x.grad, *(p.grad for p in module.parameters()))]


def worst(got: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "arguments"), POINTWISE, ids=lambda v: str(v))
def test_values_and_gradients_are_as_close_to_fp64_as_torch_s(name: str, arguments: dict, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = (module.to(dtype) for module in pair(name, arguments))
    x, grad = 2 * torch.randn(7, 5, 48).to(dtype), torch.randn(7, 5, 48).to(dtype)
    exact = run(copy.deepcopy(theirs).double(), x.double(), grad.double())
    eps = torch.finfo(dtype).eps
    for mine, torch_s in zip(worst(run(ours, x, grad), exact), worst(run(theirs, x, grad), exact), strict=True):
        assert mine <= 2 * torch_s + eps


@pytest.mark.parametrize(("name", "arguments"), POINTWISE, ids=lambda v: str(v))
def test_torch_class_repr_and_state_dict(name: str, arguments: dict) -> None:
    ours, theirs = pair(name, arguments)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(9,), (6, 9), (3, 9, 4), (2, 9, 3, 5)], ids=str)
def test_cross_entropy_loss_agrees_with_torch(shape: tuple[int, ...], label_smoothing: float, reduction: str) -> None:
    torch.manual_seed(1)
    logits = 3 * torch.randn(shape, dtype=torch.float64)
    target_shape = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.randint(9, target_shape)
    if target.numel() > 1:
        target.view(-1)[0] = -7
    arguments = {"ignore_index": -7, "reduction": reduction, "label_smoothing": label_smoothing}
    results = []
    for loss in (nn.CrossEntropyLoss(**arguments), torch.nn.CrossEntropyLoss(**arguments)):
        x = logits.clone().requires_grad_()
        value = loss(x, target)
        value.sum().backward()
        results.append((value.detach(), x.grad))
    assert results[0][0].shape == results[1][0].shape
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


WRONG = [
    ("LayerNorm", (8,), (torch.zeros(2, 7),)),
    ("RMSNorm", (8,), (torch.zeros(2, 7),)),
    ("Softmax", (2,), (torch.zeros(2, 7),)),
    ("LogSoftmax", (-3,), (torch.zeros(2, 7),)),
    ("GELU", (), (torch.zeros(2, dtype=torch.int64),)),
    ("Linear", (8, 3), (torch.zeros(2, 7),)),
    ("Embedding", (4, 3), (torch.zeros(2),)),
    ("Embedding", (4, 3), (torch.tensor([4]),)),
    ("CrossEntropyLoss", (), (torch.zeros(3, 5), torch.zeros(4, dtype=torch.int64))),
    ("CrossEntropyLoss", (), (torch.zeros(3, 5), torch.zeros(3, dtype=torch.int32))),
    ("CrossEntropyLoss", (), (torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64))),
]


@pytest.mark.parametrize(("name", "arguments", "inputs"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_wrong_input_raises_torch_s_own_error(name: str, arguments: tuple, inputs: tuple) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)) as theirs:
        getattr(torch.nn, name)(*arguments)(*inputs)
    with torch.no_grad(), pytest.raises(type(theirs.value)) as ours:
        getattr(nn, name)(*arguments)(*inputs)
    assert ours.type is theirs.type


def test_what_torch_takes_beside_floats_is_torch_s() -> None:
    assert nn.ReLU()(torch.tensor([-1, 2])).tolist() == [0, 2]
    with pytest.warns(UserWarning, match="Implicit dimension"):
        assert torch.equal(nn.Softmax()(torch.zeros(2, 4)), torch.full((2, 4), 0.25))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda space: space.ReLU(inplace=True), (torch.randn(4),)),
        (lambda space: space.SiLU(inplace=True), (torch.randn(4),)),
        (
            lambda space: space.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
            (torch.randn(4, 3), torch.arange(4) % 3),
        ),
        (lambda space: space.CrossEntropyLoss(), (torch.randn(4, 3), torch.full((4, 3), 1 / 3))),
    ],
    ids=["relu_", "silu_", "class weights", "class probabilities"],
)
def test_what_the_ops_lack_is_torch_s_and_said_once(make, inputs, caplog: pytest.LogCaptureFixture) -> None:
    fallback.log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, "fastgpt"):
        for _ in range(2):
            copies = [x.clone() for x in inputs], [x.clone() for x in inputs]
            assert torch.equal(make(nn)(*copies[0]), make(torch.nn)(*copies[1]))
            assert torch.equal(copies[0][0], copies[1][0])  # in place where torch is
    assert len(caplog.records) == 1
    assert "computed by torch" in caplog.text


def test_mlp_names_the_activations() -> None:
    with pytest.raises(ValueError, match=r"activation: got 'gelu_new'; accepted: relu, .*silu"):
        nn.MLP(8, activation="gelu_new")


@pytest.mark.parametrize("name", list(nn.ACTIVATIONS))
def test_mlp_is_its_formula(name: str) -> None:
    torch.manual_seed(2)
    mlp = nn.MLP(16, 40, activation=name, bias=True).double()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    act = {
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda h: torch.nn.functional.gelu(h, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }[name]
    hidden = act(x @ mlp.c_fc.weight.T + mlp.c_fc.bias)
    torch.testing.assert_close(mlp(x), hidden @ mlp.c_proj.weight.T + mlp.c_proj.bias, rtol=1e-10, atol=1e-12)
