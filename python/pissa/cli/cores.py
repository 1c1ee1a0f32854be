"""What other programs use of the processor's cores. Threads that wait for each other then take several times as long:
seven times, with two threads beside one busy program on two cores."""

from __future__ import annotations

import os


def note_on_cores(others: float | None = None) -> str:
    """What to do if other programs use so many cores beside this process's threads; nothing if there are enough. By
    default, that is the system's load in the last minute, before this process used any."""
    import torch

    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    others = os.getloadavg()[0] if others is None else others
    if others + threads <= cores + 0.5:
        return ""
    left = max(1, round(cores - others))
    fewer = f", or write OMP_NUM_THREADS={left} before the command" if left < threads else ""
    return f"other programs use {others:.1f} of {cores} cores, which slows threads down several times: end them{fewer}"
