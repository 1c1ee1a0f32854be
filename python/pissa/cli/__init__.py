"""The command line: `pissa finetune`, `pissa demo`, `pissa convert`, `pissa env`."""

from .main import main

__all__ = ["main"]
