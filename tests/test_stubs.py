"""The stubs of the extension modules name what the modules have."""

import ast
import re

import pytest
from paths import ROOT

import fastgpt


def stub_functions(name: str) -> dict[str, int]:
    """Function name -> number of parameters, read from the installed stub."""
    from pathlib import Path

    tree = ast.parse((Path(fastgpt.__file__).parent / f"{name}.pyi").read_text())
    return {
        node.name: len(node.args.posonlyargs) + len(node.args.args)
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_functions_and_their_parameters(name):
    module = pytest.importorskip(f"fastgpt.{name}")
    stub = stub_functions(name)
    public = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    assert set(stub) == set(public)
    for key, value in public.items():
        signature = re.match(rf"{key}\((.*)\) ->", value.__doc__).group(1)
        assert stub[key] == len(re.findall(r"\b\w+: ", signature)), signature


def test_the_package_is_marked_as_typed():
    from pathlib import Path

    assert (Path(fastgpt.__file__).parent / "py.typed").exists()
    assert (ROOT / "fastgpt/py.typed").exists()
