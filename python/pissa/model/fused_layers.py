"""Training steps on a CPU: attention, norms and gates between a model's linear layers, and dense layers with their
adapters, computed by our kernels."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pissa import ops
from pissa.base.forwards import computes_steps, replace_forward
from pissa.base.weights import has_hooks
from pissa.distributed import is_sharded
from pissa.layers import PissaLinear
from pissa.ops._gated import ACTIVATIONS
from pissa.ops.checks import FLOATS


def fuse_layers(model: nn.Module) -> None:
    """Makes an (unwrapped) model compute training steps on a CPU with `ops.attention`, `ops.rms_norm`, `ops.gated` and,
    for dense adapted layers, `ops.linear`. Results are the same within rounding, and until the first step the model
    still equals its base, which computes alike, bit for bit.

    Attention is replaced where it is torch's `scaled_dot_product_attention` ("sdpa", the default of most models).
    Dropout, a bias in the mask, and one query at a time stay with torch's. Frozen RMSNorms, and the gates of SwiGLU and
    GeGLU, are recognised by testing what each module computes. Up to 16 rows of a dense layer, autocast, and machines
    with AMX, where it was not measured, keep torch's product. `restore_forwards` undoes all of it.
    """
    AttentionInterface.register("sdpa", _attention)  # transformers' own, except for the marked modules
    module: Any
    for module in model.modules():
        module._fused_attention = True
        if isinstance(module, PissaLinear):
            module.base.fuse_product()
        if (form := _norm_form(module)) is not None:
            module._fused_norm = form
            replace_forward(module, _norm, "norms")
        if (activation := _gate_activation(module)) is not None:
            module._fused_gate = activation
            module.__dict__["_fused_act"] = module.act_fn  # the same object, and not a second submodule
            replace_forward(module, _gated, "gates")


# ---- Attention -------------------------------------------------------------------------------------------------------


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Called by transformers: takes heads [batch, heads, length, dim] and returns [batch, length, heads, dim]. Models
    choose masks by the name of their attention, so it stays "sdpa"."""
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    marked = getattr(module, "_fused_attention", False) and query.device.type == "cpu" and computes_steps(module)
    plain = others.get("position_bias") is None and others.get("softcap") is None and not dropout
    masked = attention_mask is None or attention_mask.dtype == torch.bool
    queries, keys = query.shape[2], key.shape[2]
    if not marked or not plain or not masked or queries == 1 or (causal and queries != keys):
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
        return attended
    out = ops.attention(query, key, value, mask=attention_mask, scale=scaling, causal=causal)
    return out.transpose(1, 2), None


# ---- Norms -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _norm_form(module: Any) -> tuple[float, float] | None:
    """eps and offset of a norm with one frozen weight that computes what `ops.rms_norm` does; None for any other
    module."""
    if "RMSNorm" not in type(module).__name__ or "forward" in vars(module):
        return None
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or [*dict(module.named_parameters())] != ["weight"] or weight is None:
        return None
    if weight.dim() != 1 or weight.requires_grad or weight.device.type != "cpu" or is_sharded(weight):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:  # one with a gate
        return None
    x = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    expected = module(x)
    bound = 4 * torch.finfo(weight.dtype).eps  # it is rounded twice: the norm, and its product with the weight
    for offset in (0.0, 1.0):
        normed = ops.rms_norm(x, weight, eps, offset=offset)
        if normed.dtype == expected.dtype and torch.allclose(normed, expected, bound, bound):
            return eps, offset
    return None


def _norm(module: Any, x: Tensor) -> Tensor:
    weight = module.weight
    is_ready = x.device.type == "cpu" and weight.dtype == x.dtype and not weight.requires_grad
    if not is_ready or is_sharded(weight) or not computes_steps(module):
        y: Tensor = type(module).forward(module, x)
        return y
    eps, offset = module._fused_norm
    return ops.rms_norm(x, weight, eps, offset=offset)


_norm.__name__ = "forward"  # pickle finds it by this name, so a loaded model is not fused


# ---- Gates -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _gate_activation(module: Any) -> str | None:
    """The activation of a block that computes exactly down(f(gate(x)) * up(x)); None for any other module. Its forward
    is run with stand-ins for its three layers."""
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if any(getattr(module, name, None) is None for name in names) or "forward" in vars(module):
        return None
    act_fn = module.act_fn
    if len(inspect.signature(module.forward).parameters) != 1 or has_hooks(act_fn):
        return None
    where: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    drawn = torch.randn(3, 2, 5, 64, **where, generator=torch.Generator().manual_seed(0))
    gate, up, x = drawn * torch.linspace(0.1, 60, 64, **where)  # of various sizes, to detect a limit
    layers = {"gate_proj": lambda x: gate + x, "up_proj": lambda x: up - x, "down_proj": lambda x: 2 * x}
    try:
        y = type(module).forward(SimpleNamespace(**layers, act_fn=act_fn), x)
    except Exception:  # it uses more, or other dtypes: another kind of block
        return None
    for activation in ACTIVATIONS:
        expected = 2 * ops.gated(gate + x, up - x, activation)
        if not isinstance(y, Tensor) or y.shape != expected.shape:
            return None
        if torch.allclose(y, expected, rtol=1e-5, atol=5e-3):  # 1 + tanh is off by 2^-24, times 200 twice
            return activation
    return None


def _gated(module: Any, *inputs: Any, **named: Any) -> Tensor:
    (x,) = (*inputs, *named.values())
    y: Tensor
    is_ours = type(x) is Tensor and x.device.type == "cpu" and x.dtype in FLOATS and computes_steps(module)
    if is_ours and module.act_fn is module._fused_act and not has_hooks(module.act_fn):
        gate, up = module.gate_proj(x), module.up_proj(x)
        same = gate.dtype == up.dtype and gate.dtype in FLOATS
        y = module.down_proj(ops.gated(gate, up, module._fused_gate) if same else module.act_fn(gate) * up)
    else:
        y = type(module).forward(module, *inputs, **named)
    return y


_gated.__name__ = "forward"
