"""The error that a quantised base has, by each way to make it: plain quantisation, QPiSSA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from pissa import ops
from pissa.checkpoints.spectrum import norm_squared

PLAIN = "QLoRA"
METHODS: dict[str, dict[str, Any]] = {"QPiSSA T=1": {}, "QPiSSA T=5": {"quant_iters": 5}}
"""Those with factors, and what `ops.split` is told; plain quantisation is called `PLAIN`."""


def quant_errors(weight: Tensor, format: str, ranks: Iterable[int]) -> Iterator[tuple[str, int, float]]:
    """The errors of a weight [out, in] in `format`, one at a time: method, rank (0 without factors), and ‖W - Q - s B
    A‖², Frobenius. Each needs a float32 copy of the weight.

    Args:
        ranks: of the factors; a weight with a smaller side gets that side as its rank.
    """
    yield PLAIN, 0, norm_squared(ops.dequantize(ops.quantize(weight, format)).sub_(weight))
    for rank in ranks:
        for name, options in METHODS.items():
            found = ops.split(weight, min(rank, *weight.shape), form=format, **options)
            assert isinstance(found.residual, ops.QuantizedWeight)
            yield name, rank, norm_squared(ops.dequantize(found.residual).addmm_(found.b0, found.a0).sub_(weight))
