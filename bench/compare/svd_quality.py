"""Compares the energy lost by pissa.ops.svd_lowrank with passes="auto" and torch.svd_lowrank with niter=16; its time.

    python -m bench.compare.svd_quality --json bench/results/svd_quality.json  # half an hour on one core
    python -m bench.compare.svd_quality --size 512 --seeds 1                   # does it run?

A weight is U diag(s) V^T with random orthogonal U and V and s_i = i^-p, so its best rank-r part needs no SVD. The loss
is (||S_r||^2 - ||projection||^2) / ||S_r||^2. The projection is that of the weight on the r columns found for U, or for
V, whichever loses more. U's loss is the loss of U diag(S) V^T. Each entry is the median over the seeds of the sketch.

Time is the processor time of `split`, with "auto" and with 8 passes in turns, on one thread of one core. The median of
the ratios is reported. Exit status 1: "auto" loses more than torch + 1e-5, or, up to rank 64, takes more than 1.25
times as long as 8 passes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.compare.records import machine, write
from pissa import ops

RANKS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
EXPONENTS = (0.2, 0.45, 1.0)
PASSES = (8, 10, 12, "auto")
ALLOWED = 1e-5  # more than torch loses
TIMED_RANKS = (1, 8, 16, 32, 48, 64)
ALLOWED_TIME = 1.25  # of 8 passes


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare.svd_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the weight (2048)")
    parser.add_argument("--seeds", type=int, default=5, help="sketches per entry (5)")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of timed calls (15)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every number there")
    return parser.parse_args()


def power_law(size: int, exponent: float) -> tuple[Tensor, Tensor]:
    """A weight [size, size] and its singular values, float64."""
    generator = torch.Generator().manual_seed(0)
    normal = (torch.randn(size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    u, v = (torch.linalg.qr(matrix).Q for matrix in normal)
    s = torch.arange(1, size + 1, dtype=torch.float64) ** -exponent
    return (u * s) @ v.mT, s


def loss(weight: Tensor, s: Tensor, u: Tensor, v: Tensor) -> float:
    """The larger loss of the spans of u and v, made orthonormal in float64 first."""
    best = s[: u.shape[1]].square().sum()
    sides = (torch.linalg.qr(u.double()).Q.mT @ weight, weight @ torch.linalg.qr(v.double()).Q)
    return max(1 - (side.square().sum() / best).item() for side in sides)


def seeded_torch(weight: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.svd_lowrank(weight, q=r, niter=16)


def qualities(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    print("| p | r | torch, niter = 16 |", *(f"{passes} |" for passes in PASSES))
    print("|---" * (3 + len(PASSES)) + "|")
    for exponent in EXPONENTS:
        weight, s = power_law(options.size, exponent)
        single = weight.float()
        for r in (r for r in RANKS if r <= options.size):

            def lost(decompose: Callable[[int], tuple[Tensor, Tensor, Tensor]], weight=weight, s=s) -> float:
                found = (decompose(seed) for seed in range(options.seeds))
                return median(loss(weight, s, u, v) for u, _, v in found)

            peer = lost(lambda seed, w=single, r=r: seeded_torch(w, r, seed))
            ours = {
                str(passes): lost(lambda seed, w=single, r=r, p=passes: ops.svd_lowrank(w, r, passes=p, seed=seed))
                for passes in PASSES
            }
            rows.append({"exponent": exponent, "r": r, "torch": peer, **ours, "met": ours["auto"] <= peer + ALLOWED})
            marks = (f"{value:.1e}{'' if value <= peer + ALLOWED else ' more'} |" for value in ours.values())
            print(f"| {exponent} | {r} | {peer:.1e} |", *marks, flush=True)
    return rows


def processor_time(weight: Tensor, r: int, passes: int | str) -> float:
    start = time.process_time()
    ops.split(weight, r, passes=passes)
    return time.process_time() - start


def times(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    print("\n| weight | r | 8 passes, ms | auto, ms | auto / 8 passes |\n|---|---|---|---|---|")
    weight, _ = power_law(options.size, 0.45)
    for dtype in (torch.float32, torch.bfloat16):
        stored = weight.to(dtype)
        for r in (r for r in TIMED_RANKS if r <= options.size):
            pairs = [[processor_time(stored, r, passes) for passes in (8, "auto")] for _ in range(options.pairs + 1)]
            eight, auto = zip(*pairs[1:], strict=True)
            ratio = median(b / a for a, b in pairs[1:])
            row = {"dtype": str(dtype), "r": r, "eight_ms": 1e3 * median(eight), "auto_ms": 1e3 * median(auto)}
            rows.append(row | {"ratio": ratio, "met": ratio <= ALLOWED_TIME})
            print(f"| {dtype} | {r} | {row['eight_ms']:.1f} | {row['auto_ms']:.1f} | {ratio:.2f} |", flush=True)
    return rows


def main() -> int:
    options = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    torch.set_num_threads(1)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    sizes = {"size": options.size, "seeds": options.seeds, "pairs": options.pairs}
    record = {"machine": facts, **sizes, "losses": qualities(options), "times": times(options)}
    if options.json:
        write(options.json, record)
    return int(not all(row["met"] for row in [*record["losses"], *record["times"]]))


if __name__ == "__main__":
    sys.exit(main())
