"""``python -m qwenforge``: the same program as ``qwenforge``."""

import sys

from qwenforge.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
