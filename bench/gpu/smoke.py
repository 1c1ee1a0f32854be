"""Tries the ops on the GPU once: that the CUDA library loads, and that a weight can be decomposed and quantised."""

from __future__ import annotations

import torch

import pissa
from pissa import ops
from pissa.ops import _load

if __name__ == "__main__":
    assert _load.cuda_problem is None, _load.cuda_problem
    print(pissa.build_info(), *pissa.__path__)
    weight = torch.randn(256, 128, device="cuda")
    ops.svd_lowrank(weight, 8)
    assert torch.allclose(ops.dequantize(ops.quantize(weight)), weight, atol=0.5)
