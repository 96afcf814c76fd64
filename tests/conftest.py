import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch  # noqa: F401  before _cpu, so that both share one OpenMP

ROOT = Path(__file__).resolve().parent.parent
if not any(
    (ROOT / "fastgpt").glob("_*.so")
):  # `python -m pytest` puts the checkout first; the installed package is meant
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != ROOT]

from fastgpt import _cpu  # noqa: E402
from fastgpt.nn import fallback  # noqa: E402

# Child processes must find the installed package, not the source folder that the tests are started from.
os.environ["PYTHONSAFEPATH"] = "1"
sys.path.insert(0, str(Path(__file__).parent))  # the tests' own helpers: paths.py, parity.py


@pytest.fixture(params=_cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test once for each instruction set of this machine."""
    before = _cpu.isa()
    _cpu.select_isa(request.param)
    yield request.param
    _cpu.select_isa(before)


@pytest.fixture
def whatever_size() -> Iterator[None]:
    """Our ops compute what is so small that a model's user is better off with torch's."""
    with fallback.whatever_size():
        yield
