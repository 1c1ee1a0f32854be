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
q, k = torch.randn(1, 4, 64, 16), torch.zeros(1, 4, 1 << 20, 16)
few = k[:, :, :64]
expected = ops.attention(q, few, few)
pages = int(open("/proc/self/statm").read().split()[0])
limits = resource.getrlimit(resource.RLIMIT_AS)
# Less than a head's 256 MB of scores.
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), limits[1]))
try:
    ops.attention(q, k, k)
except (MemoryError, RuntimeError) as error:  # the latter of torch 2.15, whose stable ABI keeps the words alone
    assert isinstance(error, MemoryError) or "bad_alloc" in str(error), error
    assert torch.equal(ops.attention(q, few, few), expected)
    print("no memory")
"""


@pytest.mark.cpu_only
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_thread_without_memory_raises_in_the_caller() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert run.stdout == "no memory\n", run.stderr
