"""Softmax attention on the CPU, fused."""

from __future__ import annotations

import torch
from torch import Tensor

from pissa.ops._linear import under_autocast
from pissa.ops.checks import check_devices, check_number, check_tensor, shape_error

_OPS = torch.ops.pissa


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """`softmax(scale q kᵀ) v`, head by head, as computed by `torch.nn.functional.scaled_dot_product_attention`, without
    storing the scores. CPU only. Several heads of q may share one head of k and v, which is not copied for them.

    Differentiable in q, k and v. Products are computed as in `linear`; with bfloat16 inputs their operands are
    bfloat16. The softmax is float32. A query that sees no key gets zeros. The bits do not depend on the number of
    threads.

    Args:
        q: [batch, heads, queries, dim], float32, bfloat16 or float16, with any strides. Under autocast all three are
            cast to autocast's dtype.
        k: [batch, heads / group, keys, dim], in q's dtype.
        v: [batch, heads / group, keys, dim of values], in q's dtype.
        mask: bool, [batch, heads, queries, keys] or expandable to that shape: True where a query sees a key.
        scale: factor of the scores (default: dim^-1/2).
        causal: the last query sees all keys, the one before it all but the last, and so on.

    Returns:
        [batch, heads, queries, dim of values] in q's dtype. The heads are adjacent in memory, as the next layer reads
        them: `.transpose(1, 2)` is contiguous.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    q, k, v = map(under_autocast, (q, k, v))
    operands = {"q": q, "k": k, "v": v}
    for name, tensor in operands.items():
        if check_tensor(name, tensor).dim() != 4:
            raise shape_error(name, tensor, "[batch, heads, length, dim]")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}; needed: q's, {q.dtype}")
    batch, heads, queries, dim = q.shape
    shared, keys = k.shape[1:3]
    if not dim:
        raise shape_error("q", q, "a dim of 1 or more")
    if k.shape != (batch, shared, keys, dim) or not shared or heads % shared or not keys:
        raise shape_error("k", k, f"[{batch}, heads, keys, {dim}], with heads that divide {heads}")
    if v.shape[:3] != k.shape[:3]:
        raise shape_error("v", v, f"[{batch}, {shared}, {keys}, dim]")
    scale = dim**-0.5 if scale is None else scale
    check_number("scale", scale, "a finite number, or None")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: got {mask.dtype}; needed: bool, True where a query sees a key")
        try:
            mask = mask.expand(batch, heads, queries, keys)
        except RuntimeError as error:
            raise shape_error("mask", mask, f"[{batch}, {heads}, {queries}, {keys}], or what expands to it") from error
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    check_devices({**operands, "mask": mask})
    rows = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in operands.values())
    out: Tensor
    out, _ = _OPS.attention(*rows, mask, float(scale), causal)
    return out.transpose(1, 2)
