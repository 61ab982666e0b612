"""``python -m kdlab``: the command line."""

import sys

from kdlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
