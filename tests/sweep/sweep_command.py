"""Run as a script: `sweep` with another function in place of fit.

python sweep_command.py MODULE:NAME ARGUMENTS...
"""

import functools
import sys

from tq_lightning.cli import main, sweep

if __name__ == "__main__":
    fit, *argv = sys.argv[1:]
    sweep.main = functools.partial(sweep.main, fit=fit)
    sys.exit(main(["sweep", *argv]))
