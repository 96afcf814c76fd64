"""Where the tests find real data: the folder `shared` beside the project's root, or FASTGPT_SHARED."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("FASTGPT_SHARED", ROOT.parent / "shared"))


def shared(name: str) -> Path:
    """The path of a shared data file; skips the calling test where it is not there."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} of the shared data folder ({SHARED}); set FASTGPT_SHARED")
    return path
