"""`pissa selftest`: checks the fused layer and small models on this machine. Run it before reporting a problem."""

from __future__ import annotations

import argparse
import os
import platform
import re
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pissa.cli.terminal import UserError, silence_third_parties

if TYPE_CHECKING:
    import torch

_WIDTH = 58
"""The width of a check's name and the dots after it. The whole line fits into 80 columns."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="test only this device (default: all usable ones)")


def run(args: argparse.Namespace) -> int:
    """Runs all checks and prints a line for each. Returns 0 if none has failed, otherwise 1."""
    print(f"Python {platform.python_version()}, {platform.platform()}")
    began = time.perf_counter()
    core, models = "torch, the compiled core of pissa", find_spec("peft") is not None
    # If torch or the core cannot be loaded, that has to be reported, so nothing above imports either.
    passed = {core: _passes(core, _import_ops)}
    for device in _devices(args.device) if passed[core] else ():
        from pissa.cli.verification import checks

        results = {f"{device.type}: {name}": _passes(name, check) for name, check in checks(device, models)}
        passed |= results
        if device.type == "cuda" and models and all(results.values()):
            _passed_file().parent.mkdir(parents=True, exist_ok=True)
            _passed_file().touch()
    if not models:
        print("\nModels were not tested: PEFT is not installed; run `pip install peft`, or install pissa[hf]")
    print(f"\n{sum(passed.values())} of {len(passed)} checks passed, in {time.perf_counter() - began:.0f} s.")
    for name in (name for name, right in passed.items() if not right):
        print(f"FAILED: {name}")
    print("To report a problem, give all of the above, what `pissa env` prints, and a few")
    print("lines of code, or the command, that show it.")
    return 0 if all(passed.values()) else 1


def _import_ops() -> None:
    import pissa.cli.verification  # noqa: F401

    if find_spec("peft") is not None:
        silence_third_parties()


def _passes(name: str, check: Callable[[], Iterable[str] | None]) -> bool:
    """Runs a check and prints its result. The check yields a line for each error; an exception counts as a failure
    too."""
    # Printed before the check runs, so that this line shows which check hung or ended the process.
    print(f"  {f'{name} ':.<{_WIDTH}}", end=" ", flush=True)
    began = time.perf_counter()
    wrong: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong.extend(check() or ())
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{where.name} ({Path(where.filename).name}, line {where.lineno})"
        wrong.append(f"{type(error).__name__} in {at}: {error}")
    print(f"{'FAILED' if wrong else 'ok':<6} {time.perf_counter() - began:7.2f} s", flush=True)
    for text in wrong:
        print(textwrap.indent(text, "      "))
    return not wrong


def _devices(asked: str | None) -> Iterator[torch.device]:
    """Yields the devices to test and prints each one first, with what computes there if our kernels do not."""
    import torch

    import pissa
    from pissa.ops._load import cuda_problem, has_kernels

    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch finds no GPU here; without --device all is tested that can be used")
    if asked != "cuda":
        print(f"\ncpu: {pissa.build_info()['isa']}")
        yield torch.device("cpu")
    if asked != "cpu" and has_gpu:
        print(f"\ncuda: {torch.cuda.get_device_name()}")
        if not has_kernels(torch.device("cuda")):
            print(f"PyTorch's operations compute there: {cuda_problem or 'PISSA_COMPOSITE=1 is set'}")
        yield torch.device("cuda")


# ---- The GPU ---------------------------------------------------------------------------------------------------------


def has_passed_on_gpu() -> bool:
    """Whether all checks have passed on this machine's GPU, if it has one, with these versions of pissa and torch."""
    import torch

    return torch.cuda.is_available() and _passed_file().is_file()


def _passed_file() -> Path:
    """A file that exists once all checks have passed. Its name says with what."""
    import torch

    import pissa
    from pissa.ops._load import has_kernels

    computes = "pissa" if has_kernels(torch.device("cuda")) else "composite"
    parts = torch.cuda.get_device_name(), computes, pissa.__version__, "torch", torch.__version__
    name = re.sub(r"[^\w.+]+", "_", " ".join(parts))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pissa" / f"selftest_{name}"
