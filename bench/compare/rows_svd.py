"""Rows about the decomposition of one weight, at equal loss of energy: truncated SVD, and QPiSSA's split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.compare.interleave import Case, Row, relative_error, require
from bench.compare.weights import bfloat16_weight, energy_loss, fewest_passes
from pissa import ops

PASSES = range(2, 34, 2)


def svd_rows(size: int) -> Iterator[Row]:
    for r, niter, goal in ((128, 16, 4.0), (128, 4, 3.0), (16, 16, None), (16, 4, None)):
        yield Row(f"SVD, r = {r}", f"torch.svd_lowrank, niter = {niter}", partial(_lowrank, size, r, niter), goal)
    yield Row("SVD, r = 128", "scikit-learn randomized_svd, n_iter = 4", partial(_scikit_learn, size, 128))
    yield Row("SVD, r = 128", "torch.linalg.svd", partial(_exact, size, 128), max_pairs=1)
    yield Row(
        "QPiSSA's split, r = 128: SVD, residual, nf4 with nested scales",
        "PEFT's steps, niter = 4, + bitsandbytes",
        partial(_split, size, 128),
        5.0,
        memory=True,
    )


def _at_equal_loss(size: int, r: int, theirs: Callable[[], Tensor]) -> tuple[int, str]:
    """The fewest passes that lose no more energy than the peer's V, and a note with both losses."""
    allowed = energy_loss(size, theirs())

    def loss(passes: int) -> float:
        return energy_loss(size, ops.svd_lowrank(bfloat16_weight(size), r, passes=passes)[2])

    passes, found = fewest_passes(loss, allowed, PASSES)
    return passes, f"{passes} passes lose {found:.2e} of the energy, the peer {allowed:.2e}"


def _seeded_lowrank(size: int, r: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """As PEFT calls it: a float32 copy of the weight, no oversampling. By the seed, the checked result is timed."""
    torch.manual_seed(0)
    return torch.svd_lowrank(bfloat16_weight(size).float(), q=r, niter=niter)


def _lowrank(size: int, r: int, niter: int) -> Case:
    peer = partial(_seeded_lowrank, size, r, niter)
    passes, note = _at_equal_loss(size, r, lambda: peer()[2])
    return Case(partial(ops.svd_lowrank, bfloat16_weight(size), r, passes=passes), peer, lambda: note)


def _scikit_learn(size: int, r: int) -> Case:
    from sklearn.utils.extmath import randomized_svd

    def peer() -> tuple:
        return randomized_svd(bfloat16_weight(size).float().numpy(), r, n_iter=4, random_state=0)

    passes, note = _at_equal_loss(size, r, lambda: torch.from_numpy(peer()[2].copy()).mT)
    return Case(partial(ops.svd_lowrank, bfloat16_weight(size), r, passes=passes), peer, lambda: note)


def _exact(size: int, r: int) -> Case:
    """The exact decomposition loses nothing, so there is no equal loss: ours runs its 16 passes for flat spectra."""
    weight = bfloat16_weight(size)
    ours = partial(ops.svd_lowrank, weight, r, passes=16)

    def check() -> str:
        loss = energy_loss(size, ours()[2])
        require(loss < 1e-2, f"energy loss {loss:.2e}, allowed 1e-2")
        return f"16 passes lose {loss:.2e} of the energy, the peer nothing"

    return Case(ours, lambda: torch.linalg.svd(weight.float(), full_matrices=False), check)


def _split(size: int, r: int) -> Case:
    import bitsandbytes as bnb

    weight = bfloat16_weight(size)

    def peer() -> tuple[Tensor, Tensor, Tensor, bnb.functional.QuantState]:
        u, s, v = _seeded_lowrank(size, r, 4)
        a, b = torch.diag(s.sqrt()) @ v.mT, u @ torch.diag(s.sqrt())
        rest = (weight.float() - b @ a).to(weight.dtype)
        return a, b, *bnb.functional.quantize_4bit(rest, blocksize=64, quant_type="nf4", compress_statistics=True)

    passes, note = _at_equal_loss(size, r, lambda: peer()[0].mT)
    ours = partial(ops.split_many, [weight], [r], [1.0], form="nf4", passes=passes)

    def check() -> str:
        [(a0, b0, rest, _)] = ours()
        a, b, codes, state = peer()
        mine = relative_error(ops.dequantize(rest) + b0 @ a0, weight)
        theirs = relative_error(bnb.functional.dequantize_4bit(codes, state).float() + b @ a, weight)
        # Two residuals of equal energy, cut into the same blocks: their 4-bit errors differ by chance only.
        require(mine <= 1.01 * theirs, f"error of Q + B A {mine:.3e}, the peer's {theirs:.3e}")
        return f"{note}; error of Q + B A {mine:.3e}, the peer's {theirs:.3e}"

    return Case(ours, peer, check)
