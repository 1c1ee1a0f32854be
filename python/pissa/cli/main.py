"""Entry point: parse, run one command, turn errors that the user can put right into one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pissa.cli.errors import UserError
from pissa.cli.options import make_parser

# What `pip install "pissa[cli]"` and `"pissa[demo]"` add to a plain `pip install pissa`.
_CLI_PACKAGES = ("accelerate", "matplotlib", "peft", "safetensors", "tqdm", "transformers")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `pissa` command.

    Args:
        argv: the arguments after the command's name; those of the process by default.

    Returns:
        0 when done, 1 when the environment or a check is broken, 2 for wrong input, 130 when interrupted.
    """
    args = make_parser().parse_args(argv)
    try:
        return _run(args)
    except UserError as error:
        message, code = str(error), 2
    except ModuleNotFoundError as error:
        if error.name not in _CLI_PACKAGES:
            raise
        message, code = f'needs {error.name}, which is not installed: run `pip install "pissa[cli]"`', 2
    except KeyboardInterrupt:
        left = "nothing is written" if args.command == "convert" else "a run that has begun goes on with --resume"
        message, code = f"interrupted; {left}", 130
    print(f"pissa {args.command}: {message}", file=sys.stderr)
    return code


def _run(args: argparse.Namespace) -> int:
    # Imported here, since torch and transformers take seconds and `pissa --help` needs neither.
    if args.command == "env":
        from pissa.cli.env import run
    elif args.command == "convert":
        from pissa.cli.convert import run
    elif args.command == "demo" or args.demo:
        from pissa.cli.demo import run
    else:
        from pissa.cli.finetune import run
    return run(args)
