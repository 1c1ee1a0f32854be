"""Rows about attention alone: causal, packed, padded; forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.compare.interleave import Call, Case, Row, agree
from pissa import ops

SHAPES = {"1 x 2,048, 32/8 heads of 64": (1, 32, 8, 2048, 64), "4 x 127, 9/3 heads of 64": (4, 9, 3, 127, 64)}
TINY = {"tiny, 1 x 40, 4/2 heads of 8": (1, 4, 2, 40, 8)}
# Both sides round q k and p to bfloat16, 2^-9, in sums of random terms.
BOUND = 0.02


def attention_rows(tiny: bool) -> Iterator[Row]:
    for name, shape in (TINY if tiny else SHAPES).items():
        for backward in (False, True):
            what = f"attention, forward{' + backward' if backward else ''}, {name}, bfloat16"
            yield Row(what, "torch", partial(_case, shape, backward, "causal", "torch"), 1.5 if backward else None)
            ours = "pissa, the causal flag"
            yield Row(f"{what}, padded", ours, partial(_case, shape, backward, "padded", "causal"), 0.95)
            yield Row(f"{what}, packed", "torch", partial(_case, shape, backward, "packed", "torch"))


def _mask(kind: str, batch: int, length: int) -> Tensor:
    """What transformers makes of that batch: a causal mask in which an eighth of each row is padding, or in which eight
    texts are packed."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    place = torch.arange(length)
    if kind == "padded":
        return (causal & (place < length - length // 8)).expand(batch, 1, length, length)
    text = place * 8 // length
    return (causal & (text[:, None] == text)).expand(batch, 1, length, length)


def _case(shape: tuple[int, ...], backward: bool, kind: str, against: str) -> Case:
    batch, heads, shared, length, dim = shape
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> Tensor:
        values = torch.randn(batch, length, count, dim, generator=generator).bfloat16()
        return values.transpose(1, 2).detach().requires_grad_(backward)  # as transformers has them

    q, k, v, dout = drawn(heads), drawn(shared), drawn(shared), drawn(heads).detach()
    mask = None if kind == "causal" else _mask(kind, batch, length)

    def torchs() -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)

    def ours(mask: Tensor | None = mask) -> Tensor:
        return ops.attention(q, k, v, mask=mask, causal=mask is None)

    def run(attend: Call) -> list[Tensor]:
        out = attend()
        return [out, *torch.autograd.grad(out, (q, k, v), dout)] if backward else [out]

    def check() -> str:
        names = ("out", "dq", "dk", "dv")
        return agree(BOUND, **dict(zip(names, zip(run(ours), run(torchs), strict=True), strict=False)))

    return Case(partial(run, ours), partial(run, torchs if against == "torch" else partial(ours, None)), check)
