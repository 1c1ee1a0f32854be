"""Runs programs in their own processes and measures their time and memory, with mapped memory counted separately."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

ROOT = Path(__file__).parents[2]
SAMPLE_SECONDS = 0.02


class FailedError(Exception):
    """A program ended with an error."""


@dataclass
class Usage:
    """What a process has used. Memory is the largest of samples, every 20 ms, in bytes."""

    seconds: float
    processor_seconds: float
    private: int
    """Anonymous memory: the heap, stacks, copies of mapped pages that were written to."""
    mapped: int
    """Pages of files, which the system takes back when it needs memory: checkpoints, and libraries (about 0.2 GB)."""
    together: int
    """The largest sum of the two at one time."""
    samples: int
    report: dict[str, Any] = field(default_factory=dict)
    """What the program says of itself; see `timed`."""
    output: str = ""
    """What it wrote to stdout."""

    def as_dict(self) -> dict[str, Any]:
        """All fields except the output."""
        return {name: value for name, value in asdict(self).items() if name != "output"}


def environment(threads: int) -> dict[str, str]:
    """The environment of our programs and of the peers'."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return {
        **os.environ,
        **quiet,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(threads),
    }


def run_module(
    module: str, *arguments: object, threads: int = 2, cwd: Path | None = None, timeout: float = 7200
) -> Usage:
    """Runs `python -m module arguments`, under `bench.checkpoints.timed`.

    Raises:
        FailedError: it ended with an error, or took longer than `timeout` seconds; with the end of what it wrote.
    """
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "bench.checkpoints.timed", report, module, *arguments]
        usage = run([str(part) for part in command], environment(threads), cwd or Path(folder), timeout)
        usage.report = json.loads(report.read_text())
    return usage


def run(command: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float = 7200) -> Usage:
    """Runs a command to its end; see `run_module`."""
    with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.perf_counter()
        process = subprocess.Popen(command, env=env, cwd=cwd, stdout=output, stderr=errors)
        peaks, samples = [0, 0, 0], 0
        try:
            while process.poll() is None:
                private, mapped = resident(process.pid)
                peaks = [max(pair) for pair in zip(peaks, (private, mapped, private + mapped), strict=True)]
                samples += 1
                if time.perf_counter() - begun > timeout:
                    raise FailedError(f"{' '.join(command)}: longer than {timeout} s; {_end(output, errors)}")
                time.sleep(SAMPLE_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        seconds = time.perf_counter() - begun
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            raise FailedError(f"{' '.join(command)}: exit status {process.returncode}; {_end(output, errors)}")
        written = _text(output)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    private, mapped, together = peaks
    return Usage(seconds, processor, private, mapped, together, samples, output=written)


def resident(pid: int) -> tuple[int, int]:
    """The bytes of anonymous memory and of mapped files; 0 when the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    values = {
        name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines) if "Rss" in name
    }
    return values.get("RssAnon", 0), values.get("RssFile", 0) + values.get("RssShmem", 0)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _end(output: IO[str], errors: IO[str]) -> str:
    return f"the end of its output:\n{_text(output)[-1000:]}{_text(errors)[-3000:]}"
