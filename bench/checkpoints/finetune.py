"""Measures the memory of `pissa finetune`, as a person starts it: until the model is loaded, from then on, and what the
command itself plans."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.checkpoints.processes import SAMPLE_SECONDS, FailedError, environment, resident

IN_NF4 = ("--quant", "nf4", "--gradient-checkpointing", "True")
LOADED = "\nmodel "
"""The line that the command prints when the model is loaded."""


def finetune(model: Path, *options: object, tokens: int, batch: int, threads: int, steps: int = 1) -> dict[str, Any]:
    """Trains for some steps of `batch` examples of `tokens` tokens each. Memory is the largest of samples every 20 ms,
    in bytes: anonymous ("private"), and with the pages of files ("together").

    Raises:
        FailedError: the command ended with an error; with the end of what it wrote.
    """
    with TemporaryDirectory() as folder:
        data, said = Path(folder, "train.jsonl"), Path(folder, "said")
        rows = [
            {"prompt": f"Count to {tokens + row}.", "completion": _numbers(tokens + row)} for row in range(2 * batch)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        fixed = ("--data", data, "--out", Path(folder, "out"), "--held-out", 0, "--steps", steps, "--json")
        size = ("--max-length", tokens, "--batch-size", batch)
        command = [sys.executable, "-m", "pissa", "finetune", "--model", model, *fixed, *size, *options]
        with said.open("w+") as errors, Path(folder, "result").open("w+") as output:
            phases = _sampled([str(part) for part in command], threads, output, errors, said)
            output.seek(0)
            result = json.load(output)
    return {
        **{name: phases[name] for name in ("loading", "training")},
        "seconds": phases["seconds"],
        "planned": result["plan"]["memory"],
        "options": [str(option) for option in options],
        "tokens": tokens,
        "batch": batch,
    }


def _numbers(count: int) -> str:
    """A text of at least so many tokens."""
    return " ".join(map(str, range(1, count + 1)))


def _sampled(command: Sequence[str], threads: int, output: Any, errors: Any, said: Path) -> dict[str, Any]:
    """Runs a command. Returns the seconds and the memory of each phase."""
    phases: dict[str, Any] = {name: {"private": 0, "together": 0, "seconds": 0.0} for name in ("loading", "training")}
    begun, phase = time.perf_counter(), "loading"
    process = subprocess.Popen(command, env=environment(threads), stdout=output, stderr=errors)
    try:
        while process.poll() is None:
            if phase == "loading" and LOADED in f"\n{said.read_text(errors='replace')}":
                phase = "training"
            private, mapped = resident(process.pid)
            known = phases[phase]
            known["private"], known["together"] = (
                max(known["private"], private),
                max(known["together"], private + mapped),
            )
            time.sleep(SAMPLE_SECONDS)
            known["seconds"] = time.perf_counter() - begun  # at its end
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise FailedError(f"{' '.join(command)}: exit status {process.returncode}; {said.read_text()[-3000:]}")
    phases["seconds"] = time.perf_counter() - begun
    return phases
