"""Parts of stages, run one after the other. Each has a time limit and a log, and needs some of those before it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOO_LATE_S = 10  # no part begins with less time left


class StageError(Exception):
    """A part failed; the message is a line for the summary, its log says more."""


class LeftOutError(Exception):
    """A part cannot run on this machine, which is no failure; the message says what it would need."""


class NotFinishedError(Exception):
    """A part has not come to its end for lack of time; a later run goes on."""


class OutOfTimeError(Exception):
    """The time of a part was over, and its command was ended."""


class Job:
    """A part while it runs. Its commands write to its log, and end when its time is over.

    `notes` are lines for the summary; `left_out` is what of the part cannot run on this machine.
    """

    def __init__(self, log: Path, seconds: float) -> None:
        self.log = log
        self.deadline = time.monotonic() + seconds
        self.notes: list[str] = []
        self.left_out: list[str] = []
        log.write_text("")

    def say(self, text: str) -> None:
        with self.log.open("a") as log:
            print(text, file=log)

    def lines(self) -> list[str]:
        """The log, so far."""
        return self.log.read_text(errors="replace").splitlines()

    def run(self, *command: object, **options: Any) -> None:
        """Runs a command, with options of subprocess.Popen.

        Raises:
            StageError: the command failed.
            OutOfTimeError: the time of the part is over.
        """
        if status := self.status(command, **options):
            raise StageError(f"{Path(str(command[0])).name} ended with status {status}")

    def status(
        self, command: Sequence[object], log: Path | None = None, seconds: float | None = None, **options: Any
    ) -> int | None:
        """Runs a command and returns its exit status.

        Args:
            log: where its output goes instead of the log of the part.
            seconds: a limit of its own.

        Returns:
            None if the command was ended at its own limit.

        Raises:
            OutOfTimeError: the time of the part is over.
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


@dataclass(frozen=True)
class Part:
    """A part of a stage: at most `seconds` of `work`, any exception of which means that it failed. It is not run for
    lack of one of those that it needs; of those it comes after, it makes do with what one that failed has left."""

    stage: str
    name: str
    seconds: float
    work: Callable[[Job], None]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass
class Outcome:
    """How a part ended: "passed", "failed", "left out" or "not run", why in a line if it did not pass, and what a Job
    has noted."""

    how: str
    why: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def run_part(part: Part, before: Mapping[str, Outcome], logs: Path, left: float) -> Outcome:
    """Runs a part, unless one that it needs has not passed or no time is left, and prints how it ended.

    Args:
        before: the outcomes of the parts that it needs and comes after.
        left: seconds that are left for it; it gets no more than its own.
    """
    for need in (*part.needs, *part.after):
        how = before[need].how
        if how == "left out":
            return Outcome("left out", before[need].why)
        if how == "not run" or (how == "failed" and need in part.needs):
            return _said(part, Outcome("not run", f"for lack of {need}"))
    if left < TOO_LATE_S:
        return _said(part, Outcome("not run", "no time"))
    begin = time.monotonic()
    job = Job(logs / f"{part.name}.log", min(part.seconds, left))
    try:
        part.work(job)
        outcome = Outcome("passed")
    except LeftOutError as error:
        outcome = Outcome("left out", str(error))
    except NotFinishedError as error:
        outcome = Outcome("not run", str(error))
    except OutOfTimeError as error:
        job.say(str(error))
        late = left < part.seconds
        outcome = (
            Outcome("not run", "cut off, no time") if late else Outcome("failed", f"out of its {part.seconds:g} s")
        )
    except StageError as error:
        outcome = Outcome("failed", str(error))
    except Exception as error:  # of any kind, for the other parts still run
        job.say(f"{type(error).__name__}: {error}")
        outcome = Outcome("failed", f"{type(error).__name__}: {error}")
    outcome.seconds = time.monotonic() - begin
    outcome.notes, outcome.left_out = job.notes, job.left_out
    return _said(part, outcome, job)


def _said(part: Part, outcome: Outcome, job: Job | None = None) -> Outcome:
    how = f"{outcome.how.upper() if outcome.how == 'failed' else outcome.how}, {outcome.seconds:.0f} s"
    print(f"{part.stage}, {part.name}: {how}{': ' if outcome.why else ''}{outcome.why}", flush=True)
    if outcome.how == "failed" and job:
        print(f"    the end of {job.log}:", *(f"    {line[:300]}" for line in job.lines()[-40:]), sep="\n", flush=True)
    return outcome
