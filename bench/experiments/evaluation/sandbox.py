"""Runs a program that a model wrote, in a process that reaches nothing and is given little.

What is promised, and by what (`confine` does it; Linux >= 5.12 on x86_64 or aarch64, root or user namespaces):

- no files of the machine: a mount namespace whose root is an empty tmpfs with the interpreter, its library and the
  machine's shared libraries, read-only. Only /work can be written; it has a size, and is gone with the process
- no network: a network namespace without a device, and no sockets
- no other process to see, signal or trace: a namespace of processes, which ends as one
- limits on wall and processor time, address space, files, open files and processes; no core dumps
- no privileges: root becomes nobody, nobody gains rights, the environment is empty, and a filter of system calls
  forbids what would get round the above

If the machine cannot keep one of these, nothing is run: `NoSandboxError` says which.

What is not promised:

- The kernel is shared: an error in it is a way out. Run models that you distrust in a virtual machine.
- The limits of memory and processor time are each process's: with `processes` > 1 they add up. As root, the limit of
  processes counts all of nobody's on the machine.
- **A verdict is for honest programs.** "passed" needs a proof: 16 random bytes, left in a pipe until the last line has
  run. Leaving early, by sys.exit or os._exit, is no pass. But tests and tested code share an interpreter: code written
  against this file can find the pipes, and code against its tests can return an object that is equal to everything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

_CONFINE = Path(__file__).with_name("confine.py")
_TAIL = 2000  # bytes of stderr that are kept


class Limits(NamedTuple):
    seconds: float = 10.0
    """Of wall time: three times what follows, for a busy machine."""
    cpu_seconds: int = 3
    """HumanEval's own limit."""
    memory: int = 512 << 20
    """Bytes of address space."""
    storage: int = 1 << 20
    """Bytes of any file, and of all files together."""
    processes: int = 1
    """Threads count."""


class Outcome(NamedTuple):
    passed: bool
    reason: str
    """passed, failed, timed out, out of memory, left before its end, or killed by SIGNAL."""
    stderr: str
    """Its end."""


class NoSandboxError(RuntimeError):
    """The machine cannot keep a promise of the sandbox."""


def run(program: str, limits: Limits = Limits()) -> Outcome:  # noqa: B008  a tuple does not change
    """Runs the text of a Python program, which has the standard library and /work. Passed: it has reached its end.

    Its `__name__` is "program". Stdin is empty, stdout is thrown away.

    Raises:
        NoSandboxError: the machine lacks what the sandbox needs. Nothing was run.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as stderr:
        given = {"program": program, "folder": os.path.realpath(folder), **limits._asdict()}
        command = [sys.executable, "-I", "-S", str(_CONFINE)]
        confined = subprocess.run(
            command,
            input=json.dumps(given).encode(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={},
            start_new_session=True,
            check=False,
        )
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _TAIL))
        tail = stderr.read().decode(errors="replace")
    said = json.loads(confined.stdout) if confined.returncode == 0 else {"refused": tail}
    if "refused" in said:
        raise NoSandboxError(
            f"no sandbox on this machine, so no code was run: {said['refused']}. It needs Linux >= 5.12 and root or "
            "unprivileged user namespaces; containers often forbid both: allow them, or use a virtual machine"
        )
    return Outcome(said["reason"] == "passed", said["reason"], tail)


def require() -> None:
    """Raises NoSandboxError unless an empty program passes."""
    outcome = run("")
    if not outcome.passed:
        raise NoSandboxError(f"an empty program does not pass in the sandbox: {outcome.reason}: {outcome.stderr}")
