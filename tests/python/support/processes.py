"""Starts the tests' workers in several processes: torchrun, with everything on the loopback address.

Left to itself, torchrun waits for minutes where the machine's own name does not resolve, before it starts a worker.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT = 600.0
"""Seconds after which processes are taken to hang: many times what a launch needs."""


def launch(processes: int, worker: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a file of this folder in so many processes, each with one thread.

    Raises:
        TimeoutError: they hang. They are killed, and the message has what they have written.
    """
    running = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"),
            *(str(Path(__file__).with_name(worker)), *map(str, arguments)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = running.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        raise TimeoutError(f"{processes} processes hang:\n{running.communicate()[0][-5000:]}") from None
    return subprocess.CompletedProcess(running.args, running.returncode, output)


def checked(processes: int, mode: str, folder: Path) -> dict[str, list[Any]]:
    """What the checks of `distributed_worker.py` in that mode have returned in each process, by their names."""
    done = launch(processes, "distributed_worker.py", mode, folder)
    assert done.returncode == 0, done.stdout[-5000:]
    written = [json.loads((folder / f"{mode}-{processes}-{rank}.json").read_text()) for rank in range(processes)]
    errors = [entry["error"] for found in written for entry in found.values() if "error" in entry]
    assert not errors, "\n".join(errors)
    return {name: [found[name]["value"] for found in written] for name in written[0]}
