"""`python -m fastgpt` is `fastgpt`."""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
