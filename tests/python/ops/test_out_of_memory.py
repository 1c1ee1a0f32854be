"""An op whose threads find no memory says so, and the process goes on."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource
import torch
from pissa import ops

torch.set_num_threads(2)
codes_of = torch.ops.pissa.residual_quantized
columns = (1 << 18) + 1  # no whole blocks, so that a thread sums 112 rows, 117 MB, before it quantises them
weight, few = torch.zeros(224, columns), torch.eye(224, 65)
a0, b0 = torch.ones(1, columns), torch.ones(224, 1)
expected, _ = codes_of(few, a0[:, :65].contiguous(), b0, 1.0, "nf4", 64)
pages = int(open("/proc/self/statm").read().split()[0])
limits = resource.getrlimit(resource.RLIMIT_AS)
# Enough for the codes, and not for a thread's sums.
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), limits[1]))
try:
    codes_of(weight, a0, b0, 1.0, "nf4", 64)
except (MemoryError, RuntimeError) as error:  # the latter of torch 2.15, whose stable ABI keeps the words alone
    assert isinstance(error, MemoryError) or "bad_alloc" in str(error), error
    assert torch.equal(codes_of(few, a0[:, :65].contiguous(), b0, 1.0, "nf4", 64)[0], expected)
    print("no memory")
"""


@pytest.mark.cpu_only
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_thread_without_memory_raises_in_the_caller() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert run.stdout == "no memory\n", run.stderr
