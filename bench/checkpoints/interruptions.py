"""Whether a start that was killed, or divided among processes, ends with the same bytes."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.checkpoints.processes import FailedError, environment, run

OUT = "out"
"""The name of the new folder in each working folder: it is written into the adapter's configuration."""


def init_command(source: Path, options: Sequence[str], processes: int = 1) -> list[str]:
    """`pissa init`, by torchrun if there are several processes."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        start += [f"--nproc-per-node={processes}", "-m"]
    return [*start, "pissa", "init", str(source), OUT, *options]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def killed_runs(source: Path, work: Path, options: Sequence[str], kills: int, seed: int = 0) -> dict[str, Any]:
    """Kills `pissa init` at random moments, each time in a new folder, and lets a second call finish.

    The moments are spread over the time from the first file in OUT to the end of an undisturbed run.
    """
    undisturbed, first = _begun(source, work / "whole", options)
    undisturbed.wait()
    working = time.perf_counter() - first
    expected = _finished(source, work / "again", options)  # in a folder of its own: a run that failed would show
    chance = random.Random(seed)
    moments: list[float] = []
    different: list[str] = []
    attempts = 0
    while len(moments) < kills and attempts < 3 * kills:
        attempts += 1
        folder = work / f"killed-{attempts}"
        moment = chance.random() * working
        if _kill(source, folder, options, moment) and digests(folder / OUT) != expected:  # equal: it had only to end
            moments.append(round(moment, 3))
            different += _differences(expected, _finished(source, folder, options))
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("whole", "again"):
        shutil.rmtree(work / name)
    return {"kills": len(moments), "seconds_after_the_first_file": sorted(moments), "different": different}


def divided_runs(source: Path, work: Path, options: Sequence[str], numbers: Sequence[int]) -> dict[str, Any]:
    """Runs `pissa init` by one process, and by each of the given numbers of them."""
    expected = _finished(source, work / "one", options)
    different: list[str] = []
    for processes in numbers:
        different += _differences(expected, _finished(source, work / f"by-{processes}", options, processes))
        shutil.rmtree(work / f"by-{processes}")
    shutil.rmtree(work / "one")
    return {"processes": list(numbers), "different": different}


def _differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def _finished(source: Path, folder: Path, options: Sequence[str], processes: int = 1) -> dict[str, str]:
    """Runs it to its end, from where it was. The bytes of OUT; the working folder may hold nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    run(init_command(source, options, processes), environment(1), folder)
    beside = [path.name for path in folder.iterdir() if path.name != OUT]
    if beside:
        raise FailedError(f"pissa init has left {', '.join(beside)} beside {OUT}")
    return digests(folder / OUT)


def _begun(source: Path, folder: Path, options: Sequence[str]) -> tuple[subprocess.Popen[bytes], float]:
    """A run in a new folder that has made its first file, and when it has."""
    folder.mkdir(parents=True)
    process = subprocess.Popen(
        init_command(source, options),
        env=environment(1),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not any(folder.iterdir()) and process.poll() is None:
        time.sleep(0.002)
    return process, time.perf_counter()


def _kill(source: Path, folder: Path, options: Sequence[str], moment: float) -> bool:
    """Starts it, and kills it so many seconds after its first file. Whether it was still running then."""
    process, first = _begun(source, folder, options)
    while time.perf_counter() - first < moment and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL
