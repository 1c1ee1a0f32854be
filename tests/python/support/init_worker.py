"""`pissa init` in one of several processes, of which one may be killed.

    init_worker.py RANK WRITES ARGUMENT...

RANK, or none: the rank that is killed when it has written so many tensors.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from pissa.checkpoints import rewrite
from pissa.checkpoints.output import Output
from pissa.cli import main


def kill_after(writes: int) -> None:
    """Kills this process at the write behind so many."""
    write: Any = Output.write
    left = [writes]

    def counted(*args: Any, **kwargs: Any) -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        write(*args, **kwargs)

    Output.write = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == sys.argv[1]:
        kill_after(int(sys.argv[2]))
    rewrite.BATCH = 20_000
    sys.exit(main(["init", *sys.argv[3:]]))
