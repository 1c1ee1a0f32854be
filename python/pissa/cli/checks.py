"""What `pissa selftest` checks: the fused linear layer against its formula, which needs only torch, and a small model.

The op sums products of float32 numbers. A sum of k terms, in any order, is off by at most k u Σ|terms|, u = 2^-24: the
bound of an element is the formula on absolute values, times k u.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pissa
from pissa import ops

_FEW, _MANY = 4, 150
"""Rows of x: few are multiplied by other kernels than many."""
_IN, _OUT = 392, 264
_SCALING = 0.5
_TRAINED = ("x", "a", "b")


def wrong_in_linear(form: str, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """What is wrong with the fused linear layer, forward and backward: a line each.

    Args:
        form: of the weight, "dense" or a format.
        dtype: of the activations, and of a dense weight.
    """
    terms = max(_IN, _OUT, _MANY) + 16  # of the longest sum, with the few operations around it
    for rows in (_FEW, _MANY):
        given = _tensors(rows, dtype)
        weight: Any = given["weight"].to(device)
        if form != "dense":
            weight = ops.quantize(weight.float(), form)
            given["weight"] = ops.dequantize(weight).cpu()
        tensors = {name: tensor.to(device) for name, tensor in given.items()}
        got = _values(lambda x, kept=weight, **rest: ops.linear(x, kept, **rest, scaling=_SCALING), tensors, "weight")
        exact = _values(_linear64, {name: tensor.double() for name, tensor in given.items()})
        sizes = _values(_linear64, {name: tensor.double().abs() for name, tensor in given.items()})
        unit = terms * 2.0**-24 + _half_precision(dtype, device)
        for name, tensor in got.items():
            yield from _wrong(f"{name} ({rows} rows)", tensor, exact[name], unit * sizes[name])


def _linear64(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> Tensor:
    return x @ (weight + _SCALING * (b0 + b) @ (a0 + a)).mT + bias


def _tensors(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A linear layer with an adapter of rank 8, its input, and the gradient dy."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (rows, _IN), "weight": (_OUT, _IN), "bias": (_OUT,), "a": (8, _IN), "b": (_OUT, 8)}
    shapes |= {"a0": (8, _IN), "b0": (_OUT, 8), "dy": (rows, _OUT)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, terms in {"weight": _IN, "a": _IN, "a0": _IN, "b": 8, "b0": 8}.items():
        made[name] /= math.sqrt(terms)  # no part of the sum is lost among the roundings of another
    return made | {name: made[name].to(dtype) for name in ("x", "dy", "weight")}


def _values(function: Any, given: dict[str, Tensor], *left_out: str) -> dict[str, Tensor]:
    """The output and the gradients of x, a and b."""
    tensors = {name: given[name].detach().requires_grad_(name in _TRAINED) for name in given.keys() - {*left_out}}
    dy = tensors.pop("dy")
    y = function(**tensors)
    gradients = torch.autograd.grad(y, [tensors[name] for name in _TRAINED], dy)
    return {"y": y.detach()} | {
        f"the gradient of {name}": found for name, found in zip(_TRAINED, gradients, strict=True)
    }


def _half_precision(dtype: torch.dtype, device: torch.device) -> float:
    """What activations in half precision add to the bound: factors are rounded to their dtype, and products between two
    factors. Thrice on the CPU, in bfloat16 only; on CUDA the output may be twice more."""
    if dtype == torch.float32 or (device.type == "cpu" and dtype == torch.float16):
        return 0.0
    return (3.03 if device.type == "cpu" else 5.05) * torch.finfo(dtype).eps / 2


def _wrong(what: str, got: Tensor, exact: Tensor, bound: Tensor) -> Iterator[str]:
    """The element that is farthest off for its bound, if it is too far. Its rounding to got's dtype is allowed besides;
    among the subnormal numbers, to the nearest of them."""
    format = torch.finfo(got.dtype)
    limit = bound + format.eps / 2 * exact.abs() + format.smallest_normal * format.eps
    error = (got.cpu().double() - exact).abs()
    worst = (error / limit).argmax()  # NaN counts as the largest
    yield from _above(f"error of {what}", error.flatten()[worst].item(), limit.flatten()[worst].item())


def _above(what: str, got: float, allowed: float) -> Iterator[str]:
    if not got <= allowed:  # NaN is wrong too
        yield f"{what}: got {got:.3g}, allowed {allowed:.3g}"


def wrong_in_model(form: str, device: torch.device) -> Iterator[str]:
    """What is wrong with a small model that is wrapped, trained, saved, and loaded: a line each.

    Args:
        form: of its base, "implicit" or a format.
    """
    from peft import PeftModel

    from pissa.cli.step0 import rounding_bound, step0_check
    from pissa.layers.layer import pissa_layers

    tokens = (20 * torch.arange(4)[:, None] + torch.arange(24) % 3).to(device)  # easily learnt
    given = _logits(_llama(device), tokens)
    model: Any = pissa.wrap(_llama(device), r=8, quant=None if form == "implicit" else form)
    rounding = rounding_bound(model)
    start = step0_check(model, {"input_ids": tokens})
    yield from _above("difference of the logits with and without the adapter", start.difference, start.bound)
    # What the format loses of a weight, which adds up from layer to layer as roundings do.
    lost = 0.0
    if form != "implicit":
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
        kept = ops.dequantize(ops.quantize(weight, form))
        lost = math.sqrt(len(pissa_layers(model.base_model.model))) * _off(kept, weight)
    yield from _above("difference of the logits from the given model's", _off(_logits(model, tokens), given), lost)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    losses = []
    model.train()
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    yield from _above("loss of the eighth step", losses[-1], 0.9 * losses[0])  # it falls to 0.8 of the first

    trained = _logits(model, tokens)
    with tempfile.TemporaryDirectory(prefix="pissa-selftest-") as folder:
        model.save_pretrained(folder)
        loaded = pissa.PissaModel.from_pretrained(_llama(device), folder)
        yield from _above("difference of the loaded model's logits", _off(_logits(loaded, tokens), trained), 0.0)
        if form == "implicit":  # a quantised base's rounding error a plain LoRA lacks
            plain = PeftModel.from_pretrained(_llama(device), folder)
            found = _off(_logits(plain, tokens), trained)
            yield from _above("difference of the logits by PEFT's LoRA of the same files", found, rounding)


def _llama(device: torch.device) -> Any:
    """A random Llama of two layers, always the same one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(device)


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=tokens).logits
    return logits.double()


def _off(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
