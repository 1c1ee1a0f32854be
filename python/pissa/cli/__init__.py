"""The command line: `pissa finetune`, `pissa demo`, `pissa convert`, `pissa report`, `pissa env`."""

from pissa.cli.main import main

__all__ = ["main"]
