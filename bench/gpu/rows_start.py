"""Rows about PiSSA's start: all linear layers of a 7B-shaped model at once, by the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.compare.interleave import Call, MismatchError, Result, WallClock, relative_error, require
from bench.compare.records import missing
from bench.compare.weights import energy
from bench.gpu.rows import model_weight
from pissa import ops

# What a model of Llama 2's shape, 7B, consists of: (out, in) and how many.
SHAPES_7B = {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}


def start_rows(device: str, quick: bool) -> Iterator[tuple[str, Callable[[], Result]]]:
    """The name of each row, and what measures it."""
    for kind in ("PiSSA", "QPiSSA"):
        yield f"{kind} start of a 7B model", partial(start_of_a_model, kind == "QPiSSA", device, quick)


def peft_start(weight: Tensor, r: int, quantised: bool) -> tuple[Tensor, ...]:
    """The steps of PEFT's LoraLayer.pissa_init for init_lora_weights="pissa_niter_16" and scaling 1, and, if
    `quantised`, the residual in 4 bits."""
    wide = weight.float()
    v, s, u = torch.svd_lowrank(wide, r, niter=16)
    a = torch.diag(torch.sqrt(s)) @ u.t()
    b = v @ torch.diag(torch.sqrt(s))
    rest = (wide - b @ a).to(weight.dtype)
    if quantised:
        import bitsandbytes as bnb

        bnb.functional.quantize_4bit(rest, blocksize=64, quant_type="nf4", compress_statistics=True)
    return a, b, rest


def our_start(weights: Sequence[Tensor], r: int, quantised: bool) -> list[ops.Split]:
    """The steps of pissa.wrap on the layers' weights, with two passes more than "auto": the spectra are flat."""
    splits = ops.split_many(weights, [r] * len(weights), [1.0] * len(weights), passes=16)
    if quantised:
        a0s, b0s = [s.a0 for s in splits], [s.b0 for s in splits]
        rests = ops.residual_many(weights, a0s, b0s, [1.0] * len(weights), form="nf4")
        return [ops.Split(a0, b0, rest) for a0, b0, rest in zip(a0s, b0s, rests, strict=True)]
    return splits


def _lost(weight: Tensor, a: Tensor) -> float:
    """1 - ||W V||^2 / (the sum of the r largest squared singular values)."""
    wide = weight.double() if weight.shape[0] >= weight.shape[1] else weight.double().mT
    squares = torch.linalg.eigvalsh(wide.mT @ wide).flip(0)[: a.shape[0]].sum().item()
    return 1 - energy(weight, a.mT) / squares


def start_of_a_model(quantised: bool, device: str, quick: bool, pairs: int = 3, limit_s: float = 60) -> Result:
    """The start of all linear layers of a 7B-shaped model at once, by the wall clock.

    The peer would take a minute for all layers. It decomposes one of each shape, and its time is multiplied by their
    number.
    """
    r = 16 if quick else 128
    shapes = {(256, 256): 3, (320, 256): 2} if quick else SHAPES_7B
    kind = "QPiSSA" if quantised else "PiSSA"
    work = f"{kind} start of a 7B model's {sum(shapes.values())} layers, r = {r}"
    against = "PEFT, pissa_niter_16" + (" + bitsandbytes" if quantised else "") + ", by three of its layers"
    result = Result(work, against, "default", 10.0, None, [], [], [], None, "", False)
    result.no_peer = (missing("bitsandbytes") if quantised else None) or ""
    clock = WallClock(device)

    def wall(call: Call) -> float:
        return clock(call, 1)

    try:
        numbered = enumerate(shape for shape, count in shapes.items() for _ in range(count))
        weights = [model_weight.__wrapped__(*shape, seed, device) for seed, shape in numbered]
        firsts = {shape: next(w for w in weights if tuple(w.shape) == shape) for shape in shapes}
        ours: Callable[[], object] = partial(our_start, weights, r, quantised)
        result.note = _start_check(list(firsts.values()), r, quantised, not result.no_peer)
        wall(ours)  # the peer has warmed up in the check
        begin = time.monotonic()
        for _ in range(pairs):
            mine = wall(ours)
            result.ours_ms.append(mine)
            if result.no_peer:
                continue
            theirs = sum(shapes[shape] * wall(partial(peft_start, firsts[shape], r, quantised)) for shape in shapes)
            result.peer_ms.append(theirs)
            result.ratios.append(theirs / mine)
            if time.monotonic() - begin > limit_s:
                break
    except Exception as error:
        result.failed = True
        result.note = " ".join(f"{type(error).__name__}: {error}".split())
    return result


def _start_check(weights: Sequence[Tensor], r: int, quantised: bool, with_peer: bool) -> str:
    """Checks on one layer of each shape that we lose no more energy than the peer, and in NF4 no more of the weight.
    Without bitsandbytes ours takes its place in NF4, whose codes are the same."""
    notes = []
    for weight, split in zip(weights, our_start(weights, r, quantised), strict=True):
        a, b, rest = peft_start(weight, r, quantised and with_peer)
        mine, theirs = _lost(weight, split.a0), _lost(weight, a)
        if mine > theirs + 1e-5:
            raise MismatchError(f"{list(weight.shape)}: {mine:.2e} of the energy lost, by the peer {theirs:.2e}")
        notes.append(f"{mine:.1e} / {theirs:.1e}")
        if quantised:
            product = split.b0 @ split.a0
            own = relative_error(ops.dequantize(split.residual) + product, weight)
            other = relative_error(ops.dequantize(ops.quantize(rest)) + b @ a, weight)
            require(own <= 1.01 * other, f"error of Q + B A {own:.3e}, the peer's {other:.3e}")
    return "energy lost, ours / peer: " + ", ".join(notes)
