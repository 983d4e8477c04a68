"""python -m milpy: the command line."""

import sys

from milpy.cli import main

if __name__ == "__main__":
    sys.exit(main())
