"""Tries the ops once: that the CUDA library loads, and that a weight can be decomposed and quantised.

python -m bench.gpu.smoke cuda|cpu
"""

from __future__ import annotations

import sys

import torch

import pissa
from pissa import ops
from pissa.ops import _load

if __name__ == "__main__":
    device = sys.argv[1]
    print(pissa.build_info(), *pissa.__path__)
    if device == "cuda" and _load.cuda_problem:
        sys.exit(_load.cuda_problem)
    weight = torch.randn(256, 128, device=device)
    ops.svd_lowrank(weight, 8)
    # Half of NF4's widest gap is 0.152 of a block's largest element; nested scales add some hundredths.
    error = (ops.dequantize(ops.quantize(weight)) - weight).abs().max()
    assert error < 0.2 * weight.abs().max(), f"an element in nf4 is off by {error}"
