"""Checks the arguments of pissa.ops. Errors name the argument, what was given and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pissa.ops import _load
from pissa.ops.formats import FORMATS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of weights and activations."""

PASSES_PER_STEP: int = _load._C.limits()["passes_per_step"]


def check_choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Raises ValueError unless a value is among those that are allowed."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; allowed: {', '.join(map(repr, allowed))}")


def shape_error(name: str, tensor: Tensor, needed: str) -> ValueError:
    """The error for a tensor of another shape than is needed."""
    return ValueError(f"{name}: got shape {list(tensor.shape)}; needed: {needed}")


def check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """Checks a tensor of any shape, and returns it.

    Raises:
        TypeError: it is no tensor, sharded, sparse, or in another dtype than `dtypes`.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; needed: a torch.Tensor")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name}: got a DTensor, sharded over processes; needed: a whole tensor. With FSDP call fully_shard on the "
            "blocks of the model, whose forward gathers them, not on the parts of an adapted layer [P050]"
        )
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: got dtype {str(value.dtype).removeprefix('torch.')}; allowed: {allowed}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}; needed: a dense (strided) tensor")
    return value


def check_devices(arguments: Mapping[Any, object]) -> None:
    """Checks that the tensors among the arguments are on the device of the first, which the error names."""
    places: dict[torch.device, list[str]] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            places.setdefault(value.device, []).append(str(name))
    if len(places) > 1:
        first, *others = places
        by_device = "; ".join(f"{', '.join(places[place])} on {place}" for place in (*others, first))
        raise ValueError(f"{by_device}; needed: all tensors on one device; move them with .to('{first}')")


def check_matrix(weight: object, name: str = "weight") -> Tensor:
    """Checks a dense [out, in] weight, whatever its values, and returns it detached, because what is decomposed or
    quantised carries no gradient."""
    tensor = check_tensor(name, weight)
    if tensor.dim() != 2 or tensor.numel() == 0:
        raise shape_error(name, tensor, "[out, in], not empty")
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: is on the meta device and holds no values; load the weights first")
    return tensor.detach()


def check_weights(weights: Sequence[object], names: Sequence[str]) -> tuple[list[Tensor], list[float]]:
    """The same for finite weights on one device. Also returns max|weight| of each, all found in one reading. The host
    waits for the device once."""
    tensors = [check_matrix(weight, name) for weight, name in zip(weights, names, strict=True)]
    if not tensors:  # without a tensor, torch could not find the op's kernel
        return [], []
    check_devices(dict(zip(names, tensors, strict=True)))
    bounds: list[float] = torch.ops.pissa.max_abs(tensors).tolist()
    for name, bound in zip(names, bounds, strict=True):
        check_finite(bound, name)
    return tensors, bounds


def check_finite(largest: float, name: str = "weight") -> None:
    """Raises ValueError unless a weight with this largest element is finite."""
    if not math.isfinite(largest):
        raise ValueError(f"{name}: contains NaN or Inf; only finite weights can be decomposed or quantised [P019]")


def check_lengths(lists: Mapping[str, Sequence[object] | None], count: int) -> None:
    """Checks that the arguments that are given have one item for each weight."""
    for name, values in lists.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{name}: got {len(values)}; needed: one for each of the {count} weights")


def check_rank(r: object, weight: Tensor, name: str = "r") -> None:
    """Checks the rank of factors of a weight [out, in]: TypeError if it is no int, ValueError if it is out of range."""
    if type(r) is not int:
        raise TypeError(f"{name}: got {type(r).__name__}; needed: int")
    limit = min(weight.shape)
    if not 1 <= r <= limit:
        raise ValueError(f"{name}: got {r}; allowed: 1 to min(out, in) = {limit} for a weight of {list(weight.shape)}")


def check_svd(svd: str, passes: int | str, seed: int) -> int | None:
    """Returns the passes as the compiled ops take them: None for "auto"."""
    check_choice("svd", svd, ("krylov", "subspace"))
    if passes != "auto" and (type(passes) is not int or passes < PASSES_PER_STEP or passes % PASSES_PER_STEP):
        raise ValueError(f"passes: got {passes!r}; allowed: 'auto', or an even number of at least {PASSES_PER_STEP}")
    check_seed(seed)
    return passes if isinstance(passes, int) else None


def check_seed(seed: int) -> None:
    """Checks the seed of a generator in the core."""
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed!r}; allowed: a whole number from 0 to 2**63 - 1")


def check_alternation(quant_iters: object, quantise_first: bool, tolerance: object, form: str) -> None:
    """Checks how a quantised residual is alternated with its factors."""
    if type(quant_iters) is not int or quant_iters < 1:
        raise ValueError(f"quant_iters: got {quant_iters!r}; allowed: a whole number of at least 1")
    formats = ", ".join(map(repr, FORMATS))
    if form not in FORMATS and quant_iters > 1:
        raise ValueError(f"quant_iters: got {quant_iters} with form={form!r}; allowed: 1, or more with {formats}")
    if form not in FORMATS and quantise_first:
        raise ValueError(f"quantise_first: got True with form={form!r}; allowed: False, or with {formats}")
    check_number("tolerance", tolerance, "a number of at least 0, which ends none early", least=0)


def check_number(
    name: str, value: object, allowed: str = "a finite number", *, least: float = -math.inf, above: float = -math.inf
) -> None:
    """Raises ValueError unless a value is a finite number of at least `least` and above `above`."""
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < least or value <= above:
        raise ValueError(f"{name}: got {value!r}; allowed: {allowed}")


def check_scaling(scaling: object, name: str = "scaling") -> None:
    """Checks the scaling by which start factors are divided."""
    check_number(name, scaling, "a positive number (lora_alpha / r)", above=0)


def check_change_scaling(scaling: object) -> None:
    """Checks the scaling by which a change is multiplied. 0 disables the change, and a negative one subtracts it."""
    check_number("scaling", scaling, "a finite number (lora_alpha / r)")


def check_factors(
    name_a: str, a: object, name_b: str, b: object, out_features: int, in_features: int, least: int = 1
) -> None:
    """Checks that a and b are factors of a weight of that shape, of rank `least` or more."""
    a, b = check_tensor(name_a, a), check_tensor(name_b, b)
    if a.dim() != 2 or a.shape[0] < least or a.shape[1] != in_features:
        raise shape_error(name_a, a, f"[r, in] = [r >= {least}, {in_features}]")
    if b.dim() != 2 or tuple(b.shape) != (out_features, a.shape[0]):
        raise shape_error(name_b, b, f"[out, r] = [{out_features}, {a.shape[0]}]")


def check_product(names: Sequence[str], largest: float, norm_a: float, norm_b: float, scaling: float) -> None:
    """Checks that weight - scaling * b0 @ a0, with its partial sums, stays within float32.

    Args:
        names: the names of the weight, a0 and b0.
        largest: max|weight|.
        norm_a, norm_b: the norms of the factors.
    """
    weight, a0, b0 = names
    check_finite(largest, weight)
    if not scaling * norm_a * norm_b + largest < torch.finfo(torch.float32).max:
        raise ValueError(
            f"{a0}, {b0}: contain NaN or Inf, or their product overflows float32: got norms {norm_a:.3g} and "
            f"{norm_b:.3g}, scaling {scaling:g}; needed: scaling * ‖b0‖ * ‖a0‖ + max|weight| below 3.4e38 [P125]"
        )


def check_frozen(**tensors: object) -> None:
    """Raises ValueError if a tensor that gets no gradient requires one. The arguments have the tensors' names."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(f"{name}: requires grad, but is frozen here and would get none; pass {name}.detach()")
