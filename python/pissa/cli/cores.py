"""How many threads compute. Threads that wait for each other take several times as long beside other programs: seven
times, with two threads beside one busy program on two cores."""

from __future__ import annotations

import os
import time

import psutil
import torch

from pissa.cli.terminal import count_of, print_row


class Threads:
    """Lets as many threads compute as other programs leave cores free.

    Args:
        number: how many are to compute, whatever others do. OMP_NUM_THREADS, if it is set, says that, too.
        are_chosen: whether their number may be chosen at all.
    """

    def __init__(self, number: int | None = None, are_chosen: bool = True) -> None:
        if number is not None:
            torch.set_num_threads(number)
        self._are_chosen = are_chosen and number is None and "OMP_NUM_THREADS" not in os.environ
        self._most, self._before = torch.get_num_threads(), self._read()

    def choose(self) -> None:
        """Chooses their number by what other programs have used since the last choice, and says so if it changes."""
        before, self._before = self._before, self._read()
        seconds, busy, own = (now - then for now, then in zip(self._before, before, strict=True))
        if not self._are_chosen or seconds < _SHORTEST:
            return
        cores, others = os.cpu_count() or 1, (busy - own) / seconds
        threads = max(1, min(self._most, round(cores - others)))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
            used = f"other programs use {max(others, 0):.1f} of {cores} cores"
            print_row("cores", f"{used}: {count_of(threads, 'thread')} [P096]")

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: the clock's, those of all cores at work, and those of this process."""
        times = psutil.cpu_times()
        return time.perf_counter(), sum(times[:10]) - times.idle - getattr(times, "iowait", 0.0), time.process_time()


_SHORTEST = 0.2
"""Seconds below which what is measured says little: systems count in hundredths of a second on each core."""
