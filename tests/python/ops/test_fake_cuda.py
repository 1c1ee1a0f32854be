"""Where results are, and of which shape and dtype, on a GPU that is not there: torch's fake tensors say "cuda".

torch's autograd needs a real GPU for them, so that gradients are the business of the ops that compute them, called here
like any other, and of the stand-in of cuda_stand_in.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from pissa import ops

pytestmark = pytest.mark.cpu_only

ROWS, COLS, R, TOKENS = 32, 64, 3, 5


def ones(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def calls() -> dict[str, list[tuple[Any, ...]]]:
    """For every op its arguments, with each optional one given and left out."""
    weight, x, dy, bias = ones(ROWS, COLS), ones(TOKENS, COLS), ones(TOKENS, ROWS), ones(ROWS)
    factors = [ones(*shape, dtype=torch.float32) for shape in ((R, COLS), (ROWS, R), (R, COLS), (ROWS, R))]
    a, b, a0, b0 = factors
    xa = ones(TOKENS, R, dtype=torch.float32)
    svd, rest = ("krylov", None, 0), ops.quantize(weight.float(), blocksize=64)
    stored = [(*rest[:5], 64, ROWS), (*ops.quantize(weight.float(), "int8")[:5], COLS, ROWS)]
    codes = [("nf4", 64), ("int8", COLS)]
    none = [None] * 4
    return {
        "max_abs": [([weight, x],)],
        "svd_lowrank": [(weight, 1.0, R, *svd)],
        "split": [(weight, 1.0, R, 0.5, *svd)],
        "split_many": [([weight, x], [1.0, 1.0], [R, 2], [0.5, 1.0], *svd)],
        "split_quantized": [(weight, 1.0, R, 0.5, *svd, *code) for code in codes],
        "quantization_error": [(weight, *parts[:-1], ones(ROWS, COLS)) for parts in stored],
        "residual": [(weight, a0, b0, 0.5)],
        "residual_quantized": [(weight, a0, b0, 0.5, *code) for code in codes],
        "quantize": [(weight, *code) for code in codes],
        "quantize_absmax": [(ones(300, dtype=torch.float32), ones(dtype=torch.float32))],
        "dequantize": [(*parts, COLS, torch.float16) for parts in stored],
        "linear": [(x, weight, bias, *factors, 0.5, True), (x, weight, None, *none, 1.0, False)],
        "linear_backward": [(dy, x, weight, *factors, xa, 0.5, True, need) for need in (True, False)],
        "quantized_linear": [
            call
            for parts in stored
            for call in ((x, *parts, bias, *factors, 0.5, False), (x, *parts, None, *none, 1.0, False))
        ],
        "quantized_linear_backward": [
            (dy, x, *parts, *factors, xa, 0.5, False, need) for parts in stored for need in (True, False)
        ],
        "add_low_rank": [(dy, x, *factors, 0.5, True), (dy, x, a, b, None, None, 0.5, False)],
        "add_low_rank_backward": [(dy, x, *factors, xa, 0.5, True, need) for need in (True, False)],
    }


def on_cuda(value: Any) -> Any:
    """In a FakeTensorMode: the same, its tensors on a GPU."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def described(result: Any, device: str) -> list[tuple[Any, ...]]:
    """Of each tensor what a fake one has. Strides of a size of 1 or less mean nothing."""
    return [(tuple(t.shape), t.stride() if t.numel() > 1 else (), t.dtype, device) for t in tree_leaves(result)]


def test_no_op_is_left_out() -> None:
    names = {name.removeprefix("pissa::") for name in torch._C._dispatch_get_all_op_names() if "pissa::" in name}
    assert names == calls().keys()


@pytest.mark.parametrize("name", calls())
def test_an_op_leaves_its_results_where_its_arguments_are(name: str) -> None:
    op = getattr(torch.ops.pissa, name)
    for args in calls()[name]:
        expected = described(op(*args), "cuda:0")
        with FakeTensorMode():
            fake = tree_leaves(op(*tree_map(on_cuda, args)))
        assert [described(t, str(t.device))[0] for t in fake] == expected
