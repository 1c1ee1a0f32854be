"""`python -m pissa` reports the environment; with arguments it is the `pissa` command."""

import sys

from pissa.cli import main

sys.exit(main(None if sys.argv[1:] else ["env"]))
