"""Checks that a layer and a model compute what they should. `pissa selftest` and every training run use them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import pissa
from pissa import ops
from pissa.ops.formats import FORMATS

if TYPE_CHECKING:
    from peft import PeftModel

_NOT_THE_MODELS = ("labels", "completion_mask", "ref_chosen_logps", "ref_rejected_logps")


def checks(device: torch.device, models: bool) -> Iterator[tuple[str, Callable[[], Iterator[str]]]]:
    """Yields the checks of `pissa selftest` for a device: each check's name, and a function that yields what is
    wrong."""
    for form in ("dense", *FORMATS):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = f"linear, {form} weight, {str(dtype).removeprefix('torch.')}"
            yield name, partial(wrong_in_linear, form, dtype, device)
    for form in FORMATS:
        yield f"grouped linear, {form} weights", partial(wrong_in_group, form, device)
    for form in ("implicit", *FORMATS) if models else ():
        yield f"a model, {form}: trained, saved, loaded", partial(wrong_in_model, form, device)


# ---- A layer ---------------------------------------------------------------------------------------------------------


def wrong_in_linear(form: str, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Compares the fused linear layer, forward and backward, with its formula in float64, and yields a line for each
    error.

    A float32 sum of k random terms is off by about √k u of its size, where u = 2^-24. In half precision, factors and
    products are rounded to their dtype up to five times. Each rounding is off by up to eps / 2 in either direction,
    which adds up to about one eps. The bound is four times the sum of both.

    Args:
        form: the form of the weight, "dense" or a format.
        dtype: the dtype of the activations, and of a dense weight.
    """
    for rows, out in ((4, 264), (40, 264), (150, 264), (4, 8192)):  # each by kernels of its own
        shapes = {"x": (rows, 448), "weight": (out, 448), "bias": (out,), "dy": (rows, out)}
        shapes |= {"a": (8, 448), "b": (out, 8), "a0": (8, 448), "b0": (out, 8)}
        generator = torch.Generator().manual_seed(0)
        # The terms of a sum have similar sizes, so that none is lost in the rounding of another.
        operands = {
            name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()
        }
        operands |= {name: operands[name].to(dtype) for name in ("x", "weight", "dy")}
        dense = operands.pop("weight")
        kept: Any = dense.to(device)
        if form != "dense":
            kept = ops.quantize(kept.float(), form)
            dense = ops.dequantize(kept).cpu()
        got = _with_gradients(ops.linear, kept, {name: tensor.to(device) for name, tensor in operands.items()})
        exact = _with_gradients(_linear64, dense.double(), {name: tensor.double() for name, tensor in operands.items()})
        bound = 4 * (math.sqrt(448) * 2.0**-24 + torch.finfo(dtype).eps)
        for name, tensor in exact.items():
            error = (got[name].cpu().double() - tensor).abs().max() / tensor.abs().max()
            yield from _check_at_most(f"error of {name} ({rows} rows, {out} columns)", error.item(), bound)


def wrong_in_group(form: str, device: torch.device) -> Iterator[str]:
    """Compares layers that are computed together with each by itself, in bfloat16. Each rounds up to five times."""
    generator, offsets = torch.Generator().manual_seed(0), (0, 3, 43, 45)
    x, *dense = (torch.randn(rows, 448, generator=generator).to(device) for rows in (45, 264, 264, 264))
    a, b = ([torch.randn(*size, generator=generator).to(device) for _ in dense] for size in ((8, 448), (264, 8)))
    weights = [ops.quantize(weight / math.sqrt(448), form) for weight in dense]
    together = ops.grouped_linear(x.bfloat16(), weights, offsets, a=a, b=b)
    rows = [x[first:last].bfloat16() for first, last in pairwise(offsets)]
    layers = zip(rows, weights, a, b, strict=True)
    apart = torch.cat([ops.linear(own, weight, a=of_a, b=of_b) for own, weight, of_a, of_b in layers])
    error = (together - apart).abs().max() / apart.abs().max()
    yield from _check_at_most("difference", error.item(), 4 * torch.finfo(torch.bfloat16).eps)


def _linear64(
    x: Tensor, weight: Tensor, *, bias: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, scaling: float
) -> Tensor:
    return x @ (weight + scaling * (b0 + b) @ (a0 + a)).mT + bias


def _with_gradients(linear: Callable[..., Tensor], weight: Any, operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the output and the gradients of x, a and b, where dy is the gradient of the output."""
    tensors = {name: tensor.detach().requires_grad_(name in ("x", "a", "b")) for name, tensor in operands.items()}
    trained = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    x, dy = tensors.pop("x"), tensors.pop("dy")
    y = linear(x, weight, **tensors, scaling=0.5)
    gradients = torch.autograd.grad(y, list(trained.values()), dy)
    return {"y": y.detach()} | {f"the gradient of {name}": g for name, g in zip(trained, gradients, strict=True)}


def _check_at_most(what: str, got: float, allowed: float) -> Iterator[str]:
    if not got <= allowed:  # also true for NaN
        yield f"{what}: got {got:.3g}, allowed {allowed:.3g}"


# ---- A model ---------------------------------------------------------------------------------------------------------


class Step0(NamedTuple):
    """The relative difference of the logits with and without the adapter, and the largest that rounding explains."""

    difference: float
    bound: float


def step0_check(model: PeftModel, batch: dict[str, Any]) -> Step0:
    """Compares the logits before training with the adapter enabled (the model) and disabled (the base). If the adapter
    starts wrong (PiSSA on a base that lacks its principal part), they differ by about 1.

    Args:
        model: the model, with one active adapter. Afterwards it is in evaluation mode.
        batch: a batch as a TRL trainer collates it, on the model's device. Tokens that attention_mask excludes are not
            compared.
    """
    inputs = {key: value for key, value in batch.items() if key not in _NOT_THE_MODELS}
    enabled = _logits(model, inputs)
    with model.disable_adapter():
        disabled = _logits(model, inputs)
    return Step0(_relative_difference(enabled, disabled), _rounding_bound(model))


def packing_check(model: PeftModel, batch: dict[str, Any]) -> float:
    """Returns the relative difference of the logits of a batch's last text, packed with others in one row, from those
    of the text alone. Models whose state goes on from one text to the next differ by about 1.

    Args:
        model: see `step0_check`.
        batch: a row of texts as a TRL trainer packs it, with position_ids that begin anew with each text.
    """
    inputs = {key: value for key, value in batch.items() if key not in _NOT_THE_MODELS}
    last = int((inputs["position_ids"][0] == 0).nonzero()[-1])
    alone = _logits(model, {"input_ids": inputs["input_ids"][:, last:]})
    return _relative_difference(_logits(model, inputs)[last:], alone)


def _rounding_bound(model: PeftModel) -> float:
    """Returns the largest relative difference of logits that rounding explains between two passes that compute the same
    function but may round differently.

    For an adapted layer of inner dimension k, a float32 sum of k products (u = eps/2) is off by about √k u of its norm,
    once in each of the two passes. The layer's output is then rounded to the base's dtype, so that the two passes
    differ by at most eps. These errors are independent from layer to layer and pass the layers above with a gain near
    1. They therefore add up like a random walk: √(Σ 2 k u²) + √n eps(dtype) for n layers.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    summation = math.sqrt(sum(2 * layer.in_features for layer in layers)) * torch.finfo(torch.float32).eps / 2
    return summation + math.sqrt(len(layers)) * torch.finfo(model.get_base_model().dtype).eps


def wrong_in_model(form: str, device: torch.device) -> Iterator[str]:
    """Wraps a small model with its base in this form, trains, saves and loads it, and yields a line for each error."""
    from peft import PeftModel

    from pissa.layers.layer import pissa_layers

    tokens = {"input_ids": (20 * torch.arange(4)[:, None] + torch.arange(24) % 3).to(device)}  # easily learned
    unwrapped = _logits(_llama(device), tokens)
    model: Any = pissa.wrap(_llama(device), r=8, quant=None if form == "implicit" else form)
    start = step0_check(model, tokens)
    yield from _check_at_most("difference of the logits with and without the adapter", start.difference, start.bound)
    # The error of the format for one weight. It adds up from layer to layer, as rounding errors do.
    lost = 0.0
    if form != "implicit":
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
        kept = ops.dequantize(ops.quantize(weight, form))
        lost = math.sqrt(len(pissa_layers(model.base_model.model))) * _relative_difference(kept, weight)
    off = _relative_difference(_logits(model, tokens), unwrapped)
    yield from _check_at_most("difference of the logits from the given model's", off, lost)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    losses = []
    model.train()
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**tokens, labels=tokens["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    yield from _check_at_most(
        "loss of the eighth step", losses[-1], 0.9 * losses[0]
    )  # it falls to 0.8 of the first step's

    trained = _logits(model, tokens)
    with tempfile.TemporaryDirectory(prefix="pissa-selftest-") as folder:
        model.save_pretrained(folder)
        loaded = pissa.PissaModel.from_pretrained(_llama(device), folder)
        off = _relative_difference(_logits(loaded, tokens), trained)
        yield from _check_at_most("difference of the loaded model's logits", off, 0.0)
        if form == "implicit":  # a plain LoRA lacks the rounding error of a quantised base
            plain = PeftModel.from_pretrained(_llama(device), folder)
            off = _relative_difference(_logits(plain, tokens), trained)
            yield from _check_at_most("difference of the logits by PEFT's LoRA of the same files", off, start.bound)


def _llama(device: torch.device) -> Any:
    """A random two-layer Llama, always the same one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(device)


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The logits, in evaluation mode, of the tokens that attention_mask includes."""
    logits: Tensor = model.eval()(**inputs, use_cache=False).logits
    mask = inputs.get("attention_mask")
    return (logits.flatten(0, 1) if mask is None else logits[mask.bool()]).float()


def _relative_difference(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
