"""`pissa completion`: prints the script that a shell needs to complete the commands and their options."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = "put the output where this shell looks for completions"
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help=where)


def run(args: argparse.Namespace) -> int:
    """Prints the completion script. Returns the exit code."""
    import shtab

    from pissa.cli import COMMANDS, parser_for

    print(shtab.complete(parser_for(COMMANDS), shell=args.shell))
    return 0
