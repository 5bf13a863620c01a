"""``python -m rnnfast`` runs the same commands as the console script."""

import sys

from rnnfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
