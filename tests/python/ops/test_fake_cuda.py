"""Every op as torch has to know it: by torch's own check, and by where results are, and of which shape and dtype, on a
GPU that is not there: torch's fake tensors say "cuda".

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

from devices import put
from pissa import ops

ROWS, COLS, R = 32, 64, 3
OPS = sorted(
    name.removeprefix("pissa::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("pissa::") and name != "pissa::closed_routes"  # a question to CUDA
)


def ones(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return put(torch.ones(shape, dtype=dtype))


def calls(tokens: int = 5) -> dict[str, list[tuple[Any, ...]]]:
    """For every op its arguments, with each optional one given and left out."""
    weight, x, dy, bias = ones(ROWS, COLS), ones(tokens, COLS), ones(tokens, ROWS), ones(ROWS)
    factors = [ones(*shape, dtype=torch.float32) for shape in ((R, COLS), (ROWS, R), (R, COLS), (ROWS, R))]
    a, b, a0, b0 = factors
    _, kept = torch.ops.pissa.linear(x, weight, None, *factors, 0.5, True)
    leaf_x, leaf_a, leaf_b = (tensor.clone().requires_grad_() for tensor in (x, a, b))
    leaves = (leaf_a, leaf_b, a0, b0)
    svd, rest = ("krylov", None, 0), ops.quantize(weight.float(), blocksize=64)
    stored = [(*rest[:5], 64, ROWS), (*ops.quantize(weight.float(), "int8")[:5], COLS, ROWS)]
    codes = [("nf4", 64), ("int8", COLS)]
    none = [None] * 4

    def group(parts: tuple[Any, ...], *factors: Any) -> tuple[Any, ...]:
        lists = [None if part is None else [part, part.clone()] for part in parts[:4]]
        return [0, 2, tokens], *lists, *parts[4:], *factors

    labels, head_bias = put(torch.arange(tokens)), ones(ROWS, dtype=torch.float32)
    q, k, v = (torch.ones(1, heads, tokens, 8) for heads in (4, 2, 2))  # on the CPU: no GPU has this op
    q_leaf, seen = q.clone().requires_grad_(), torch.ones(1, 4, tokens, tokens, dtype=torch.bool)
    return {
        "max_abs": [([weight, x],)],
        "svd_lowrank": [(weight, 1.0, R, *svd)],
        "split_many": [([weight, x], [1.0, 1.0], [R, 2], [0.5, 1.0], *svd)],
        "quantization_error": [(weight, *parts[:-1], ones(ROWS, COLS)) for parts in stored],
        "residual": [(weight, a0, b0, 0.5)],
        "residual_quantized": [(weight, a0, b0, 0.5, *code) for code in codes],
        "quantize": [(weight, *code) for code in codes],
        "feedback_codes": [(weight, ones(COLS, COLS, dtype=torch.float32), *parts[1:-1]) for parts in stored],
        "merge_codes": [
            (*(part.cpu() if isinstance(part, Tensor) else part for part in parts[:-1]), *others, True, 3)
            for parts in stored
            for others in ((a.cpu(), b.cpu(), 0.5, None), (a.cpu(), b.cpu(), 0.5, torch.eye(COLS)))
        ],
        "add_second_moment": [(ones(COLS, COLS, dtype=torch.float32), x)],
        "quantize_absmax": [(ones(300, dtype=torch.float32), offset) for offset in (ones(dtype=torch.float32), None)],
        "dequantize": [(*parts, COLS, torch.float16) for parts in stored],
        "dequantize_rows": [(*parts, COLS, ones(2, 3, dtype=torch.int64), torch.float16) for parts in stored],
        "linear": [(leaf_x, weight, bias, *leaves, 0.5, True), (x, weight, None, *none, 1.0, False)],
        "linear_backward": [(dy, x, weight, *factors, kept, 0.5, True, need) for need in (True, False)],
        "quantized_linear": [
            call
            for parts in stored
            for call in ((leaf_x, *parts, bias, *leaves, 0.5, False), (x, *parts, None, *none, 1.0, False))
        ],
        "quantized_linear_backward": [
            (dy, x, *parts, *factors, kept, 0.5, False, need) for parts in stored for need in (True, False)
        ],
        "add_low_rank": [(dy, leaf_x, *leaves, 0.5, True), (dy, x, leaf_a, leaf_b, None, None, 0.5, False)],
        "token_scores": [
            (leaf_x, weight, head_bias, labels, 0.5, 3.0, True),
            (x, weight, None, labels, 1.0, 0.0, False),
        ],
        "quantized_token_scores": [
            call
            for parts in stored
            for call in (
                (leaf_x, *parts, head_bias, labels, 0.5, 3.0, True),
                (x, *parts, None, labels, 1.0, 0.0, False),
            )
        ],
        "gated": [(q_leaf, q, "silu")],
        "gated_backward": [(q, q, q, "silu")],
        "rms_norm": [(q_leaf, torch.ones(8), 1.0, 1e-5)],
        "rms_norm_backward": [(q, q, torch.ones(8), torch.ones(1, 4, tokens), 1.0)],
        "attention": [(q_leaf, k, v, seen, 0.5, False), (q, k, v, None, 0.5, True)],
        "attention_backward": [
            (
                torch.ones(1, tokens, 4, 8),
                q,
                k,
                v,
                mask,
                *torch.ops.pissa.attention(q, k, v, mask, *how),
                *how,
            )
            for mask, how in ((seen, (0.5, False)), (None, (0.5, True)))
        ],
        "grouped_linear": [
            (leaf_x, *group(parts, [leaf_a] * 2, [leaf_b] * 2, [a0] * 2, [b0] * 2), 0.5) for parts in stored
        ]
        + [(x, *group(stored[0], [a, a], [b, b], None, None), 1.0)],
        "grouped_linear_backward": [
            (
                dy,
                x,
                *group(parts, [a] * 2, [b] * 2, [a0] * 2, [b0] * 2),
                ones(tokens, R, dtype=torch.float32),
                0.5,
                need,
            )
            for parts in stored
            for need in (True, False)
        ],
        "add_low_rank_backward": [(dy, x, *factors, kept, 0.5, True, need) for need in (True, False)],
    }


def on_cuda(value: Any) -> Any:
    """In a FakeTensorMode: the same, its tensors on a GPU."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def described(result: Any, device: str) -> list[tuple[Any, ...]]:
    """Of each tensor what a fake one has. Strides of a size of 1 or less mean nothing."""
    return [
        (tuple(t.shape), t.stride() if t.numel() > 1 else (), t.dtype, device)
        for t in tree_leaves(result)
        if t is not None
    ]


@pytest.mark.parametrize("tokens", [5, 20])  # for many a GPU keeps sums of factors
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, tokens: int) -> None:
    for args in calls(tokens)[name]:
        torch.library.opcheck(getattr(torch.ops.pissa, name).default, args)


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", OPS)
def test_an_op_leaves_its_results_where_its_arguments_are(name: str) -> None:
    op = getattr(torch.ops.pissa, name)
    for args in calls()[name]:
        expected = described(op(*args), "cuda:0")
        with FakeTensorMode():
            fake = [t for t in tree_leaves(op(*tree_map(on_cuda, args))) if t is not None]
        assert [described(t, str(t.device))[0] for t in fake] == expected
