"""What other programs use of the processor's cores. Threads that wait for each other then take several times as long:
seven times, with two threads beside one busy program on two cores."""

from __future__ import annotations

import os
import time

import psutil
import torch


class Cores:
    """The time, and the cores that other programs use, from now on."""

    def __init__(self) -> None:
        self._now = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: the clock's, those of all cores at work, and those of this process."""
        times = psutil.cpu_times()
        return time.perf_counter(), sum(times[:10]) - times.idle - getattr(times, "iowait", 0.0), time.process_time()

    def elapsed(self) -> tuple[float, float]:
        """The seconds, and the cores that others used."""
        seconds, busy, own = (now - then for now, then in zip(self._read(), self._now, strict=True))
        return seconds, (busy - own) / seconds


def note_on_cores(others: float) -> str:
    """What to do if other programs use so many cores beside this process's threads; nothing if there are enough."""
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    if others <= 0.5 or others + threads <= cores + 0.5:
        return ""
    left = max(1, round(cores - others))
    fewer = f", or write OMP_NUM_THREADS={left} before the command" if left < threads else ""
    return f"other programs use {others:.1f} of {cores} cores, which slows threads severalfold: end them{fewer} [P096]"
