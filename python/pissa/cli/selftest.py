"""`pissa selftest`: checks the ops and small models on this machine; what to run before reporting a problem."""

from __future__ import annotations

import argparse
import platform
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from pissa.cli.terminal import UserError, silence_third_parties

if TYPE_CHECKING:
    import torch

    from pissa.cli.findings import Check, Finding

_WIDTH = 58
"""Of a check's name with the dots behind it. The whole line fits into 80 columns."""

_REPORT = """\
To report a problem, give all of the above, what `pissa env` prints, and a few
lines of code, or the command, that show it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="compute there only, not on all that pissa can use")


def run(args: argparse.Namespace) -> int:
    """Runs all checks, a line each. Returns 0 if none has failed, else 1.

    Raises:
        UserError: a device that cannot be used.
    """
    print(f"Python {platform.python_version()}, {platform.platform()}")
    tally = _Tally()
    tally.section("Imports")
    # If torch or the core does not load, that is what is to be reported: nothing above imports either.
    has_ops = tally.passes("torch, the compiled core of pissa", _import_ops)
    devices, not_tested = _devices(args.device) if has_ops else ([], "")
    has_peft = _is_installed("peft")
    has_models = has_ops and has_peft and tally.passes("PEFT, transformers", _import_models)
    for device in devices:
        from pissa.cli.op_checks import op_checks

        tally.section(f"Ops on {device.type}", _details(device))
        for name, check in op_checks(device).items():
            tally.passes(name, check)
    for device in devices if has_models else []:
        from pissa.cli.model_checks import model_checks

        tally.section(f"Small models on {device.type}")
        for name, check in model_checks(device).items():
            tally.passes(name, check)
    if not_tested:
        print(f"\nThe GPU was not tested: {not_tested}")
    if not has_peft:
        print('\nModels were not tested: PEFT is not installed; run `pip install "pissa[cli]"`')
    tally.end()
    return 1 if tally.failed else 0


class _Tally:
    """Runs checks, prints them, and counts."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self._count = 0
        self._section = ""
        self._began = time.perf_counter()

    def section(self, title: str, details: str = "") -> None:
        self._section = title
        print(f"\n{title}{details and f': {details}'}")

    def passes(self, name: str, check: Check) -> bool:
        """Whether the check passes. An error that it raises is a failure too."""
        # Before it runs: this line tells which check has hung, or ended the process.
        print(f"  {f'{name} ':.<{_WIDTH}}", end=" ", flush=True)
        began = time.perf_counter()
        wrong = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for finding in check():
                    if not finding.passed:
                        wrong.append(str(finding))
        except Exception as error:
            wrong.append(_told(error))
        print(f"{'FAILED' if wrong else 'ok':<6} {time.perf_counter() - began:7.2f} s", flush=True)
        for text in wrong:
            print(textwrap.indent(text, "      "))
        self._count += 1
        if wrong:
            self.failed.append(f"{self._section}: {name}")
        return not wrong

    def end(self) -> None:
        seconds = time.perf_counter() - self._began
        print(f"\n{self._count - len(self.failed)} of {self._count} checks passed, in {seconds:.0f} s.")
        for name in self.failed:
            print(f"FAILED: {name}")
        print(_REPORT)


def _told(error: Exception) -> str:
    """What was raised, and where."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {where.name} ({Path(where.filename).name}, line {where.lineno}): {error}"


def _import_ops() -> Iterable[Finding]:
    import pissa.cli.op_checks  # noqa: F401

    return ()


def _import_models() -> Iterable[Finding]:
    silence_third_parties()
    import pissa.cli.model_checks  # noqa: F401

    return ()


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _devices(asked: str | None) -> tuple[list[torch.device], str]:
    """Where to compute; and why not on the GPU, if there is one that was not asked to be left out."""
    import torch

    from pissa.ops._load import cuda_problem

    has_gpu = torch.cuda.is_available()
    problem = cuda_problem if has_gpu else "torch finds no GPU here"
    if asked == "cuda" and problem is not None:
        raise UserError(f"--device cuda: {problem}; without --device all is tested that can be used")
    names = [asked] if asked is not None else ["cpu"] if problem is not None else ["cpu", "cuda"]
    not_tested = problem if has_gpu and asked is None else None
    return [torch.device(name) for name in names], not_tested or ""


def _details(device: torch.device) -> str:
    import torch

    import pissa

    versions = f"pissa {pissa.__version__}, torch {torch.__version__}"
    if device.type == "cuda":
        return f"{versions}, {torch.cuda.get_device_name()}"
    return f"{versions}, {pissa.build_info()['isa']}, {torch.get_num_threads()} threads"
