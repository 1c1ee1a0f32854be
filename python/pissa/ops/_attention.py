"""Softmax attention on the CPU, fused."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pissa.ops.checks import check_devices, check_tensor

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
    """`softmax(scale q kᵀ) v`, head by head, as `torch.nn.functional.scaled_dot_product_attention` computes it, without
    its scores in memory; on the CPU. Several heads of q may share one of k and v, which is not repeated for them.

    Differentiable in q, k and v. Products as `linear`'s, with bfloat16 operands of bfloat16; the softmax is float32. A
    query that sees no key gets zeros. The same bits for any number of threads.

    Args:
        q: [batch, heads, queries, dim], float32, bfloat16 or float16, strided in any way. Under autocast all three are
            cast to its dtype.
        k: [batch, heads / group, keys, dim] of that dtype.
        v: [batch, heads / group, keys, dim of values] of that dtype.
        mask: bool, [batch, heads, queries, keys] or what can be expanded to it: True where a query sees a key.
        scale: dim^-1/2 by default.
        causal: the last query sees all keys, the one before it all but the last, and so on.

    Returns:
        [batch, heads, queries, dim of values] in q's dtype; with heads beside each other in memory, as the next layer
        takes them: `.transpose(1, 2)` is contiguous.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        q, k, v = (tensor.to(torch.get_autocast_dtype(q.device.type)) for tensor in (q, k, v))
    given = {"q": q, "k": k, "v": v}
    for name, tensor in given.items():
        if check_tensor(name, tensor).dim() != 4:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}; needed: [batch, heads, length, dim]")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}; needed: q's, {q.dtype}")
    batch, heads, queries, dim = q.shape
    shared, keys = k.shape[1:3]
    if not dim:
        raise ValueError(f"q: got shape {list(q.shape)}; needed: a dim of 1 or more")
    if k.shape != (batch, shared, keys, dim) or not shared or heads % shared or not keys:
        raise ValueError(
            f"k: got shape {list(k.shape)}; needed: [{batch}, heads, keys, {dim}], with heads that divide {heads}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: got shape {list(v.shape)}; needed: [{batch}, {shared}, {keys}, dim]")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: got {scale!r}; allowed: a finite number, or None")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: got {mask.dtype}; needed: bool, True where a query sees a key")
        try:
            mask = mask.expand(batch, heads, queries, keys)
        except RuntimeError as error:
            raise ValueError(
                f"mask: got shape {list(mask.shape)}; needed: [{batch}, {heads}, {queries}, {keys}], or what expands "
                "to it"
            ) from error
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    check_devices({**given, "mask": mask})
    rows = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in given.values())
    out: Tensor
    out, _ = _OPS.attention(*rows, mask, dim**-0.5 if scale is None else float(scale), causal)
    return out.transpose(1, 2)
