"""`pissa completion`: prints the script by which a shell completes commands and options, without Python."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shells = ("bash", "zsh", "tcsh")
    parser.add_argument("shell", metavar="SHELL", choices=shells, help="the shell that is to read the script")


def run(args: argparse.Namespace) -> int:
    """Prints the script. Returns the exit code."""
    import shtab

    from pissa.cli import COMMANDS, parser_for

    print(shtab.complete(parser_for(COMMANDS), shell=args.shell))
    return 0
