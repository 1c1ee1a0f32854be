"""Stages, one after the other. Each has a time limit and a log, and needs some of those before it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TOO_LATE_S = 10  # no stage begins with less time left


class StageError(Exception):
    """A stage failed; its log says more."""


class OutOfTimeError(StageError):
    """The time of a stage was over, and its command was ended."""


class Stage:
    """A stage while it runs. Its commands write to its log, and end when its time is over."""

    def __init__(self, log: Path, seconds: float) -> None:
        self.log = log
        self.deadline = time.monotonic() + seconds

    def say(self, text: str) -> None:
        with self.log.open("a") as log:
            print(text, file=log)

    def run(self, *command: object, **options: Any) -> None:
        """Runs a command, with options of subprocess.Popen.

        Raises:
            StageError: the command failed, or the time of the stage is over.
        """
        if status := self.status(command, **options):
            raise StageError(f"{command[0]} ended with status {status}")

    def status(
        self, command: Sequence[object], log: Path | None = None, seconds: float | None = None, **options: Any
    ) -> int | None:
        """Runs a command and returns its exit status.

        Args:
            log: where its output goes instead of the log of the stage.
            seconds: a limit of its own.

        Returns:
            None if the command was ended at its own limit.

        Raises:
            OutOfTimeError: the time of the stage is over.
        """
        left = self.deadline - time.monotonic()
        with (log or self.log).open("a") as out:
            process = subprocess.Popen(
                list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, start_new_session=True, **options
            )
            try:
                return process.wait(left if seconds is None else min(seconds, left))
            except subprocess.TimeoutExpired:
                if time.monotonic() >= self.deadline:
                    raise OutOfTimeError(f"{command[0]} was ended") from None
                return None
            finally:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that still runs, and all that it has started."""
    for how, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, how)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


class Stages:
    """Runs stages and prints how each ended. `failed` and `skipped` name those that did not pass."""

    def __init__(self, logs: Path, seconds: float, after_each: Callable[[], None]) -> None:
        self.logs = logs
        self.begin = time.monotonic()
        self.seconds = seconds
        self.after_each = after_each
        self.failed: list[str] = []
        self.skipped: list[str] = []

    def run(self, name: str, seconds: float, work: Callable[[Stage], None], needs: Sequence[str] = ()) -> None:
        """Runs a stage, unless one that it needs has not passed or no time is left.

        Args:
            seconds: of the stage, less if less is left of the whole run.
            work: does it; any exception means that the stage failed.
        """
        lacking = next((need for need in needs if need in (*self.failed, *self.skipped)), None)
        left = self.seconds - (time.monotonic() - self.begin)
        if lacking or left < TOO_LATE_S:
            self.skip(name, f"for lack of {lacking}" if lacking else "no time is left")
            return
        start = time.monotonic()
        seconds = min(seconds, left)
        stage = Stage(self.logs / f"{name}.log", seconds)
        try:
            work(stage)
        except Exception as error:  # of any kind, for the other stages still run
            self.failed.append(name)
            stage.say(f"{type(error).__name__}: {error}")
            if isinstance(error, OutOfTimeError):
                print(f"{name}: out of its {seconds:.0f} s")
            print(f"{name}: FAILED after {time.monotonic() - start:.0f} s; the end of {stage.log}:")
            end = stage.log.read_text(errors="replace").splitlines()[-40:]
            print(*(f"    {line[:300]}" for line in end), sep="\n", flush=True)
        else:
            print(f"{name}: passed in {time.monotonic() - start:.0f} s", flush=True)
        finally:
            self.after_each()

    def skip(self, name: str, reason: str) -> None:
        print(f"{name}: not run, {reason}", flush=True)
        self.skipped.append(name)
