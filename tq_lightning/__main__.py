"""`python -m tq_lightning`."""

import sys

from tq_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
