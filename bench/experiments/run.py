"""Runs the cells that are not known yet, each in its own process, a given number at a time."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import IO, NamedTuple

from tqdm import tqdm

from bench.experiments.experiment import Cell, Options, Result
from bench.experiments.results import Results

Wanted = Callable[[], list[Cell]]


class _Running(NamedTuple):
    cell: Cell
    process: multiprocessing.process.BaseProcess
    begun: float
    said: IO[bytes]
    """What the process has written: shown if it fails."""


def run(wanted: Wanted, results: Results, options: Options, jobs: int) -> list[Cell]:
    """Runs what is wanted until nothing is missing, and returns the cells that failed, whose errors are on stderr.

    A fork of this process runs each cell: it has the packages and what `prepare` has loaded, and its peak of memory is
    its own. Forking needs that no thread runs here: torch has one, tqdm none.
    """
    tqdm.monitor_interval = 0
    # In a fork torch's thread pool is not valid for the threads that transformers loads weights with (torch 2.13).
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended; finished cells are kept, the others are run next time"))
    fork = multiprocessing.get_context("fork")
    running: dict[Connection, _Running] = {}
    failed: list[Cell] = []
    with tqdm(unit="cell", smoothing=0.1) as bar:
        while True:
            cells = list(dict.fromkeys(wanted()))
            active = [entry.cell for entry in running.values()]
            missing = [cell for cell in cells if cell not in results and cell not in active and cell not in failed]
            bar.total, bar.n = len(cells), sum(cell in results for cell in cells)
            bar.refresh()
            for cell in missing[: jobs - len(running)]:
                cell.prepare(options)
                receiver, sender = fork.Pipe(duplex=False)
                said = tempfile.TemporaryFile()  # noqa: SIM115  closed when the cell has ended
                process = fork.Process(target=_measure, args=(cell, options, sender, said.fileno()), daemon=True)
                process.start()
                sender.close()
                running[receiver] = _Running(cell, process, time.monotonic(), said)
            if not running:
                return failed
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                cell, process, begun, said = running.pop(ready)
                try:
                    result, processor = ready.recv()
                    seconds = {"wall": round(time.monotonic() - begun, 1), "processor": round(processor, 1)}
                    results.add(cell, result, seconds)
                except EOFError:  # the process has ended without a result
                    failed.append(cell)
                    said.seek(0)
                    bar.write(f"{said.read().decode(errors='replace')}\nfailed: {cell}", file=sys.stderr)
                said.close()
                process.join()


def _measure(cell: Cell, options: Options, sender: Connection, said: int) -> None:
    """The process of a cell. Its output goes to the file `said`, because the screen shows the bar of all cells."""
    os.dup2(said, 1)
    os.dup2(said, 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    begun = time.process_time()
    try:
        result: Result = cell.run(options)
        result["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        sender.send((result, time.process_time() - begun))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
