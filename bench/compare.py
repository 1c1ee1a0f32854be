"""Speed beside torch, both sides alternating in one process: medians and quartiles of the ratio torch / pissa.

    taskset -c 0,1 python bench/compare.py

Each row first checks that both sides compute the same thing, or, for the decomposition, that ours loses no more energy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from pissa import build_info, ops

PAIRS = 7
SIZE = 4096


def milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def compare(name: str, ours: Callable[[], Any], peer: Callable[[], Any]) -> None:
    ours(), peer()  # warm up
    pairs = [(milliseconds(ours), milliseconds(peer)) for _ in range(PAIRS)]
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    quartiles = f"{ratios[PAIRS // 4]:.2f} to {ratios[-1 - PAIRS // 4]:.2f}"
    print(f"| {name} | {mine:.1f} | {theirs:.1f} | {statistics.median(ratios):.2f} ({quartiles}) |", flush=True)


def energy(weight: torch.Tensor, v: torch.Tensor) -> float:
    return (weight @ torch.linalg.qr(v).Q).square().sum().item()


def hard_spectrum() -> torch.Tensor:
    """Noise with 256 power-law spikes: what the singular values of a language model's weights look like."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    u, v = (torch.linalg.qr(torch.randn(SIZE, 256, generator=generator)).Q for _ in range(2))
    return noise + (u * 8 * torch.arange(1, 257) ** -0.5) @ v.T


def main() -> None:
    print(f"{torch.get_num_threads()} threads, {build_info()['isa']}, torch {torch.__version__}\n")
    print("| work (weight 4096 x 4096) | pissa, ms | torch, ms | torch / pissa |\n|---|---|---|---|")
    weight = hard_spectrum()
    low = weight.bfloat16()
    for r, passes, niter in ((16, 8, 8), (16, 12, 16), (128, 8, 8), (128, 12, 16)):
        ours, peer = ops.svd_lowrank(low, r, passes=passes)[2], torch.svd_lowrank(low.float(), q=r, niter=niter)[2]
        assert energy(low.float(), ours) >= energy(low.float(), peer) * (1 - 1e-6)
        compare(
            f"SVD, r = {r}, bf16, {passes} passes against niter = {niter}",
            lambda r=r, passes=passes: ops.svd_lowrank(low, r, passes=passes),
            lambda r=r, niter=niter: torch.svd_lowrank(low.float(), q=r, niter=niter),
        )
    quantized = ops.nf4_quantize(low)
    for tokens in (16, 512):
        x = torch.randn(tokens, SIZE)
        x_low = x.bfloat16()
        torch.testing.assert_close(ops.linear(x, weight), linear(x, weight), rtol=1e-3, atol=1e-3)
        compare(f"linear f32, {tokens} tokens", lambda x=x: ops.linear(x, weight), lambda x=x: linear(x, weight))
        compare(
            f"linear nf4, {tokens} tokens bf16, against dense bf16",
            lambda x=x_low: ops.linear(x, quantized),
            lambda x=x_low: linear(x, low),
        )


if __name__ == "__main__":
    main()
