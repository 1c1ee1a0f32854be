"""Times two sides that do the same work in turns in one process: rows, their checks, ratios and peak memory.

A disturbance affects both sides of a pair: the clock rate, neighbours on a shared machine, the state of the heap. The
ratio is therefore taken pair by pair, and its median and quartiles are reported.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROW_SECONDS = 12  # a row stops after this, but not before it has MIN_PAIRS
MIN_PAIRS = 5

Call = Callable[..., Any]


class MismatchError(Exception):
    """The two sides do not compute the same thing."""


@dataclass
class Case:
    """Both sides of a row, ready to be called, and the check that they compute the same.

    `check` raises MismatchError, or returns a note. `fresh` makes the argument of one call outside the timed region.
    One call does the work `units` times; times are for one. Without a peer `no_peer` says why, and ours is timed alone.
    """

    ours: Call
    peer: Call | None
    check: Callable[[], str]
    fresh: Callable[[], Any] | None = None
    units: int = 1
    no_peer: str = ""


@dataclass
class Row:
    """One line of the table. `goal` is the least ratio wanted; `max_pairs` is for calls that take seconds."""

    work: str
    against: str
    build: Callable[[], Case]
    goal: float | None = None
    stretch: float | None = None
    setting: str = "default"
    max_pairs: int | None = None
    memory: bool = False


@dataclass
class Result:
    """A measured row. Times are milliseconds of one call; a failed row has only its note. A row without a peer has our
    times alone."""

    work: str
    against: str
    setting: str
    goal: float | None
    stretch: float | None
    ours_ms: list[float]
    peer_ms: list[float]
    ratios: list[float]
    growth_mib: tuple[float, float] | None
    note: str
    failed: bool
    no_peer: str = ""

    def as_dict(self) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        if self.ours_ms:
            summary["ours_median_ms"] = statistics.median(self.ours_ms)
        if self.ratios:
            summary |= {
                "peer_median_ms": statistics.median(self.peer_ms),
                "ratio_median": statistics.median(self.ratios),
                "ratio_quartiles": quartiles(self.ratios),
            }
        return asdict(self) | summary


def in_turns(calls: Sequence[Call]) -> Call:
    """A call that makes `calls` in turns, so that none finds its inputs in the cache."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


# ---- Agreement -------------------------------------------------------------------------------------------------------


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Relative difference in the Frobenius norm."""
    reference = theirs.detach().double()
    return ((ours.detach().double() - reference).norm() / reference.norm()).item()


def agree(bound: float, **pairs: tuple[Tensor | None, Tensor | None]) -> str:
    """Requires each pair (ours, theirs) to be there and within `bound`; returns the largest error in words."""
    errors = {}
    for name, (ours, theirs) in pairs.items():
        if ours is None or theirs is None:
            raise MismatchError(f"{name}: {'pissa' if ours is None else 'the peer'} returned none")
        require(ours.shape == theirs.shape, f"{name}: shape {list(ours.shape)}, the peer's {list(theirs.shape)}")
        errors[name] = relative_error(ours, theirs)
        if not errors[name] <= bound:  # also refuses NaN
            raise MismatchError(f"{name}: relative error {errors[name]:.1e}, allowed {bound:.1e}")
    return f"error {max(errors.values()):.1e}"


def require(condition: bool, message: str) -> None:
    if not condition:
        raise MismatchError(message)


# ---- Measuring -------------------------------------------------------------------------------------------------------


class CudaClock:
    """Milliseconds of one call between two events on the GPU, the mean of `repeats` calls.

    Other work keeps the GPU busy until the calls are queued, so that neither side pays for its CPU time. A write to
    memory before clears the cache; calls should take turns with their inputs if it could hold them.
    """

    sample_ms = 5
    SPIN_CYCLES = 40_000_000  # 20 ms at 2 GHz

    def __init__(self) -> None:
        self._flushed = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Call, repeats: int, fresh: Callable[[], Any] | None = None) -> float:
        arguments = () if fresh is None else (fresh(),)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._flushed.zero_()
        torch.cuda._sleep(self.SPIN_CYCLES)
        start.record()
        for _ in range(repeats):
            call(*arguments)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats


class WallClock:
    """Milliseconds that the caller waits until the device is done, the mean of `repeats` calls: what launching costs on
    the CPU counts too."""

    sample_ms = 20  # calls are timed in batches of at least this: the clock and the scheduler disturb less by 1%

    def __init__(self, device: str = "cpu") -> None:
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def __call__(self, call: Call, repeats: int, fresh: Callable[[], Any] | None = None) -> float:
        arguments: tuple[Any, ...] = ()
        if fresh is not None:
            gc.collect()  # models are cycles: the last call's would stay in memory
            arguments = (fresh(),)
        self._wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call(*arguments)
        self._wait()
        return 1e3 * (time.perf_counter() - start) / repeats


Clock = CudaClock | WallClock


def run(row: Row, pairs: int, clock: Clock | None = None) -> Result:
    """Builds, checks and measures a row. A failure of any kind is a result, so that other rows still run."""
    result = Result(row.work, row.against, row.setting, row.goal, row.stretch, [], [], [], None, "", False)
    try:
        case = row.build()
        result.note, result.no_peer = case.check(), case.no_peer
        if row.memory and case.peer:
            result.growth_mib = (peak_growth(case.ours, case.fresh), peak_growth(case.peer, case.fresh))
        with _no_garbage_collection():
            _measure(case, min(pairs, row.max_pairs or pairs), result, clock or WallClock())
    except Exception as error:
        result.failed = True
        result.note = " ".join(f"{type(error).__name__}: {error}".split())
    return result


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection takes 0.1 s where transformers is loaded, and would fall on either side by chance."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _measure(case: Case, pairs: int, result: Result, clock: Clock) -> None:
    repeats = 1
    if pairs > 1:  # a row of one pair is for a call of many seconds, whose warming up is lost in it
        sides = [call for call in (case.ours, case.peer) if call]
        quickest = min(clock(call, 1, case.fresh) for call in sides)
        if case.fresh is None:
            repeats = max(1, math.ceil(clock.sample_ms / quickest))
            quickest = min(clock(call, repeats, None) for call in sides)
            repeats = max(1, math.ceil(clock.sample_ms / quickest))
    start = time.monotonic()
    for pair in range(pairs):
        if pair >= MIN_PAIRS and time.monotonic() - start > ROW_SECONDS:
            break
        if case.peer is None:
            result.ours_ms.append(clock(case.ours, repeats, case.fresh) / case.units)
            continue
        if pair % 2:
            theirs, mine = (clock(call, repeats, case.fresh) for call in (case.peer, case.ours))
        else:
            mine, theirs = (clock(call, repeats, case.fresh) for call in (case.ours, case.peer))
        result.ours_ms.append(mine / case.units)
        result.peer_ms.append(theirs / case.units)
        result.ratios.append(theirs / mine)


def quartiles(ratios: list[float]) -> tuple[float, float]:
    if len(ratios) == 1:
        return ratios[0], ratios[0]
    lower, _, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return lower, upper


# ---- Memory ----------------------------------------------------------------------------------------------------------


def peak_growth(call: Call, fresh: Callable[[], Any] | None) -> float:
    """MiB by which one call raises the peak of the resident memory above what is resident before it.

    The call is not the first: scratch that a library keeps between calls is not counted. Memory that malloc keeps
    is handed back first, or a warm heap would hide what the call allocates.
    """
    arguments = () if fresh is None else (fresh(),)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status_kib("VmRSS")
    call(*arguments)
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


def page_faults_of_fresh_output() -> int:
    """Page faults that a fresh 32 MiB output costs once the heap is warm: about 8192 where malloc maps it anew each
    time, almost none where malloc keeps it. Filling costs 2 ms, the faults 10 ms."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(32 << 20, dtype=torch.uint8)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults
