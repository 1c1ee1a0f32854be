"""Where the time of a decomposition goes: kernels by their time, for one weight, and for 26 and 128 weights at once.

    python -m bench.gpu.profiling [--device cpu] [--quick]

Below the tables are the steps of libraries alone: torch calls the same potrfBatched of cuSOLVER for its batched
Cholesky factors. Our eigensolver, three kernels (cuda/eigh.cu), is in the tables; torch's own is shown for comparison.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.compare.interleave import WallClock
from bench.gpu.rows import model_weight
from pissa import ops

SHOWN = 24  # kernels of a table
PASSES = 16  # in 8 steps, of blocks of 70 vectors at r = 128


def table(title: str, work: Callable[[], object], device: str) -> None:
    """Prints the kernels (on the CPU torch's operators) of a second call of `work`, those first that take longest."""
    clock = WallClock(device)
    work()
    alone = clock(work, 1)
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        clock(work, 1)
    events = [e for e in profiler.key_averages() if (e.device_type == DeviceType.CUDA) == on_gpu]
    times = {e.key: ((e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3, e.count) for e in events}
    busy = sum(ms for ms, _ in times.values())
    print(f"\n{title}: {alone:.2f} ms by the wall clock; {busy:.2f} ms in kernels, profiled\n")
    print("| ms | share | calls | kernel |\n|---|---|---|---|")
    for name, (ms, calls) in sorted(times.items(), key=lambda item: -item[1][0])[:SHOWN]:
        print(f"| {ms:.3f} | {ms / busy:.1%} | {calls} | {name[:120].replace('|', '/')} |")


def alone(title: str, work: Callable[[], object], device: str) -> None:
    clock = WallClock(device)
    work()
    times = sorted(clock(work, 1) for _ in range(3))
    print(f"{title}: {times[1]:.2f} ms, the median of 3 ({times[0]:.2f} to {times[-1]:.2f})", flush=True)


def positive_definite(count: int, side: int, device: str) -> Tensor:
    rows = torch.randn(count, side, 2 * side, dtype=torch.float64, device=device)
    return rows @ rows.mT


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.profiling")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="weights of 256 x 256, r = 16")
    options = parser.parse_args()
    size, r, block = (256, 16, 20) if options.quick else (4096, 128, 70)
    counts = (1, 2) if options.quick else (1, 26, 128)
    for count in counts:
        weights = [model_weight.__wrapped__(size, size, seed, options.device) for seed in range(count)]
        work = partial(ops.split_many, weights, [r] * count, [1.0] * count, passes=PASSES)
        table(f"split_many of {count} weights [{size}, {size}], r = {r}, {PASSES} passes", work, options.device)
        del weights, work
    print()
    for count in counts:
        gram = positive_definite(count, block, options.device)
        work = partial(torch.linalg.cholesky_ex, gram)
        alone(f"Cholesky factors of {count} [{block}, {block}], float64", work, options.device)
    for count in counts[:2]:  # cuSOLVER takes one after the other: 128 would be much of a minute
        side = PASSES // 2 * block
        work = partial(torch.linalg.eigh, positive_definite(count, side, options.device))
        alone(f"torch's eigenvectors of {count} [{side}, {side}], float64", work, options.device)


if __name__ == "__main__":
    main()
