"""Our ops inside other people's models, and adapters to other libraries, each imported by its own name.

    report = fastgpt.accelerate(model)   # in place; print(report) says what was replaced, what was not, and why
    fastgpt.restore(model)               # everything as it was

None of it is needed by the rest of the package; importing it changes nothing anywhere.
"""

from fastgpt.compat import hf
from fastgpt.compat.patch import patched
from fastgpt.compat.replace import Report, accelerate, restore

__all__ = ["Report", "accelerate", "hf", "patched", "restore"]
