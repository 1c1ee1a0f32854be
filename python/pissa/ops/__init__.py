"""The core as functions on tensors: truncated SVD, PiSSA's split, quantised weights, the fused linear layer, attention,
norms, gates, and the scores of an output layer.

Only torch is needed. Each function validates its arguments, raises a `ValueError` or `TypeError` that names the
argument, and calls `torch.ops.pissa.*`. These are the compiled ops (see cpp/pissa/torch/schema.cc), which work under
`torch.compile`, autocast, gradient checkpointing and `torch.func` fakes, and have gradients, but no second derivatives.
The orientation is torch's: a weight is [out, in], and y = x Wᵀ + b.

On the CPU, the ops compute on torch's threads. A process that was forked has none of them: if its parent has computed
with several threads, its first op never returns, which is so for torch's own operations, too. Start processes by
"spawn", or call `torch.set_num_threads(1)` in the child first, as torch's DataLoader does.
"""

from __future__ import annotations

from typing import Any

from pissa.ops import composite as composite
from pissa.ops import formats
from pissa.ops._attention import attention
from pissa.ops._gated import gated
from pissa.ops._grouped import grouped_linear
from pissa.ops._linear import add_low_rank, linear
from pissa.ops._load import _C
from pissa.ops._merge import Merged, linear_through, merge_codes
from pissa.ops._norm import rms_norm
from pissa.ops._principal import residual_many, svd_lowrank
from pissa.ops._quant import QuantizedWeight, dequantize, embedding, quantize
from pissa.ops._scores import TokenScores, token_scores
from pissa.ops._second_moment import add_second_moment
from pissa.ops._split import Split, split_many

__all__ = [
    "Merged",
    "QuantizedWeight",
    "Split",
    "TokenScores",
    "add_low_rank",
    "add_second_moment",
    "attention",
    "build_info",
    "dequantize",
    "embedding",
    "formats",
    "gated",
    "grouped_linear",
    "linear",
    "linear_through",
    "merge_codes",
    "quantize",
    "residual_many",
    "rms_norm",
    "split_many",
    "svd_lowrank",
    "token_scores",
]


def build_info() -> dict[str, Any]:
    """Returns version, compiler, oldest supported torch, instruction set in use (`PISSA_ISA` overrides it), available
    ones.

    "int8": whether products may be of integers (`linear`). "isas_unused": for each faster instruction set of this build
    "name: why it is not used". "cuda": None if the build has no CUDA library, otherwise its "runtime" version and GPU
    "architectures". Whether it can be used here is another question: if not, PyTorch's operations compute on CUDA, for
    a reason that `pissa env` prints.
    """
    return dict(_C.build_info())
