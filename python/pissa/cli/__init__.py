"""The command line: the commands that `pissa --help` lists."""

from pissa.cli.main import main

__all__ = ["main"]
