"""`pissa run`: runs another program, with `pissa.integrations.peft` enabled in it.

The program replaces this process, where the system can do that. PYTHONPATH begins with the folder `startup`. Therefore
the program's Python, or the Python that it starts, finds `startup/peft.py` when it imports peft.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from pissa.cli.startup import peft
from pissa.cli.terminal import UserError, user_errors
from pissa.system import run_instead

_ALLOWED = "give a command, a .py file, or -m MODULE, and its arguments: pissa run -- trl sft --config run.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pissa run [--init pissa] [--] PROGRAM [ARGUMENT ...]"
    start = "initialisation of adapters for which the program chooses none, as TRL's scripts do"
    parser.add_argument("--init", choices=["pissa"], help=start)
    program = "a command, a .py file, or -m MODULE; and its arguments"
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="PROGRAM", help=program)


def run(args: argparse.Namespace) -> int:
    """Runs the program in place of this process. In it, and in the Python processes that it starts, which inherit
    PYTHONPATH, adapters that PEFT makes are pissa's in the cases that `integrations.peft` describes."""
    program: list[str] = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not program:
        raise UserError(f"got no program; {_ALLOWED} [P116]")
    name, *arguments = program
    # A command of this environment takes precedence over those on PATH.
    executable = shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)
    if name == "-m" or name.endswith(".py"):
        executable, arguments = sys.executable, program
    if executable is None:
        raise UserError(f"{name} is not a command of this environment, and not on PATH; {_ALLOWED} [P116]")
    folders = filter(None, [peft.FOLDER, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    if args.init is not None:
        environment[peft.INIT] = args.init
    shown = " ".join(program[:2] if program[0] == "-m" else program[:1])
    print(f"pissa run: PEFT's PiSSA and LoRA on 4-bit layers are pissa's in {shown}", file=sys.stderr, flush=True)
    with user_errors(OSError, before=f"{shown}: "):
        return run_instead(executable, arguments, environment)
