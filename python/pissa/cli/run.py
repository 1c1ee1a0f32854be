"""`pissa run`: runs a program of somebody else's, in which `pissa.integrations.peft` is enabled."""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from importlib.util import find_spec

from pissa.cli.startup import sitecustomize
from pissa.cli.terminal import UserError

_ALLOWED = "give a command, a .py file, or -m MODULE, and its arguments: pissa run -- trl sft --config run.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pissa run [--init pissa] [--] PROGRAM [ARGUMENT ...]"
    parser.add_argument(
        "--init",
        choices=["pissa"],
        help="the start of adapters about which the program says nothing; TRL's scripts cannot say it",
    )
    parser.add_argument(
        "program",
        nargs=argparse.REMAINDER,
        metavar="PROGRAM",
        help="a command, a .py file, or -m MODULE; and its arguments",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the program in this process, as Python would. In it and in the Python processes that it starts, which
    inherit PYTHONPATH, adapters that PEFT makes are ours where `integrations.peft` says so.

    Returns:
        The program's exit code, if it ends by itself; most raise SystemExit.

    Raises:
        UserError: there is no such program.
    """
    program: list[str] = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not program:
        raise UserError(f"got no program; {_ALLOWED}")
    start = _found(program)
    if args.init is not None:
        os.environ[sitecustomize.INIT] = args.init
    paths = [sitecustomize.FOLDER, os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    sitecustomize.install()
    shown = " ".join(program[:2] if program[0] == "-m" else program[:1])
    print(f"pissa run: PEFT's PiSSA and LoRA on 4-bit layers are pissa's in {shown}", file=sys.stderr, flush=True)
    return start()


def _found(program: list[str]) -> Callable[[], int]:
    """What runs the program. A command of this environment comes before those on PATH."""
    name, arguments = program[0], program[1:]
    if name == "-m":
        if not arguments:
            raise UserError(f"got -m without a module; {_ALLOWED}")
        return _module(arguments)
    if name.endswith(".py"):
        if not os.path.isfile(name):
            raise UserError(f"{name} is no file; {_ALLOWED}")
        return partial(_run_file, program)
    beside = os.path.join(os.path.dirname(os.path.abspath(sys.executable)), os.path.basename(name))
    commands = metadata.entry_points(group="console_scripts", name=os.path.basename(name))
    if commands and (os.path.dirname(name) == "" or os.path.abspath(name) == beside):
        return partial(_run_command, next(iter(commands)), [beside, *arguments])
    path = shutil.which(name) or shutil.which(beside)
    if path is None:
        raise UserError(f"{name} is no command of this environment, and not on PATH; {_ALLOWED}")
    return partial(_run_other, [path, *arguments])


def _module(arguments: list[str]) -> Callable[[], int]:
    name, sys.path[0] = arguments[0], os.getcwd()
    try:
        is_there = find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in
        is_there = False
    if not is_there:
        raise UserError(f"there is no module {name}; {_ALLOWED}")
    return partial(_run_module, arguments)


def _run_module(arguments: list[str]) -> int:
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    return 0


def _run_file(program: list[str]) -> int:
    sys.argv, sys.path[0] = list(program), os.path.dirname(os.path.abspath(program[0]))
    runpy.run_path(program[0], run_name="__main__")
    return 0


def _run_command(command: metadata.EntryPoint, argv: list[str]) -> int:
    sys.argv, sys.path[0] = argv, os.path.dirname(os.path.abspath(argv[0]))
    sys.exit(command.load()())


def _run_other(command: list[str]) -> int:
    """Runs what is no Python of this environment; if it starts one that has this package, that has PYTHONPATH."""
    code = subprocess.run(command, check=False).returncode
    return 128 - code if code < 0 else code  # as a shell says that a signal has ended it
