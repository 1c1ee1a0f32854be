"""`pissa run`: runs a program of somebody else's, in which `pissa.integrations.peft` is enabled.

The program takes the place of this process. Python, which it is or starts, finds `startup/peft.py` for peft, for
PYTHONPATH begins with that folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from pissa.cli.startup import peft
from pissa.cli.terminal import UserError, add_calibration, told

_ALLOWED = "give a command, a .py file, or -m MODULE, and its arguments: pissa run -- trl sft --config run.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pissa run [--init pissa] [--calibration FILE [--examples N]] [--] PROGRAM [ARGUMENT ...]"
    parser.add_argument(
        "--init",
        choices=["pissa"],
        help="the start of adapters about which the program says nothing; TRL's scripts cannot say it",
    )
    add_calibration(
        parser,
        "records (.jsonl, .json) of what the model will read: what a model loaded with load_in_4bit loses is repaired "
        "beneath its LoRA, from the 16-bit checkpoint that it was loaded from",
    )
    parser.add_argument(
        "program",
        nargs=argparse.REMAINDER,
        metavar="PROGRAM",
        help="a command, a .py file, or -m MODULE; and its arguments",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the program in the place of this process. In it and in the Python processes that it starts, which inherit
    PYTHONPATH, adapters that PEFT makes are ours where `integrations.peft` says so."""
    program: list[str] = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not program:
        raise UserError(f"got no program; {_ALLOWED}")
    name, *arguments = program
    # A command of this environment comes before those on PATH.
    found = shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)
    if name == "-m" or name.endswith(".py"):
        found, arguments = sys.executable, program
    if found is None:
        raise UserError(f"{name} is no command of this environment, and not on PATH; {_ALLOWED}")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [peft.FOLDER, os.environ.get("PYTHONPATH", "")]))
    }
    if args.init is not None:
        environment[peft.INIT] = args.init
    if args.calibration is not None:
        environment[peft.CALIBRATION] = f"{args.examples} {os.path.abspath(args.calibration)}"
    shown = " ".join(program[:2] if program[0] == "-m" else program[:1])
    print(f"pissa run: PEFT's PiSSA and LoRA on 4-bit layers are pissa's in {shown}", file=sys.stderr, flush=True)
    with told(OSError, before=f"{shown}: "):
        os.execve(found, [found, *arguments], environment)
