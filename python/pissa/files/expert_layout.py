"""How PEFT's files lay out the factors of fused experts: one pair of tensors holds those of all experts of a module."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence

import torch
from torch import Tensor, nn

from pissa.layers.experts import WEIGHTS, UnfusedExperts, is_transposed, unfused_experts


def check_uniform(model: nn.Module, factors: Mapping[str, tuple[int, float]]) -> None:
    """Checks that PEFT's layout can hold the adapter: one rank and scaling for all experts of a module.

    Args:
        factors: rank and scaling of each adapted layer, by its name in the model.

    Raises:
        ValueError: naming the first layer that differs.
    """
    for path, experts in unfused_experts(model).items():
        for name in experts.names:
            first = factors.get(f"{path}.0.{name}")
            for index in range(1, len(experts)):
                if factors.get(layer := f"{path}.{index}.{name}") != first:
                    raise ValueError(
                        f"layer {layer} is adapted otherwise than {path}.0.{name}; the experts of a module need one "
                        "rank and alpha, or none of them an adapter: see target_modules, rank_pattern, alpha_pattern"
                    )


def adapted_names(path: str, experts: UnfusedExperts, layers: Container[str]) -> list[str]:
    """The weights of the experts that have an adapter; `layers` names the adapted layers of the model."""
    return [name for name in experts.names if f"{path}.0.{name}" in layers]


def is_mirrored(fused: nn.Module) -> bool:
    """Whether PEFT takes the weights of fused experts for [experts, out, in], and they are [experts, in, out]. Its
    factors of them are those of the transposed matrices: bᵀ in the place of a, aᵀ in the place of b."""
    return is_transposed(fused) and not getattr(fused, "is_transposed", False)


def places(path: str, names: Sequence[str]) -> dict[str, str]:
    """The prefix under which PEFT's files hold the factors of each adapted weight of an experts module. PEFT wraps the
    module once for each weight, in the parameters' order; the last wrapper is the outermost."""
    return {name: path + ".base_layer" * (len(names) - 1 - i) for i, name in enumerate(names)}


def weight_at(place: str, names: Collection[str]) -> tuple[str, str] | None:
    """The experts module and the weight whose factors are under a prefix in PEFT's files: the way back from `places`.

    Args:
        names: the weights of that module that have an adapter, in any order.

    Returns:
        The module's name and the weight's; None if no adapter of fused experts can have such a prefix.
    """
    path = place.split(".base_layer")[0]
    ordered = [name for name in WEIGHTS if name in names]
    found = {place: name for name, place in places(path, ordered).items()}
    return (path, found[place]) if len(ordered) == len(names) and place in found else None


def stack(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """PEFT's layout of the experts' factors a [r, in] and b [out, r]: [experts * r, in], one expert after
    another, and [out, r * experts], the expert being the faster index."""
    a, b = zip(*factors, strict=True)
    return torch.cat(a), torch.stack(b, dim=-1).flatten(1)


def unstack(a: Tensor, b: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """The way back from `stack`."""
    split_a, split_b = a.reshape(experts, -1, a.shape[1]), b.reshape(len(b), -1, experts)
    return [(split_a[index], split_b[..., index]) for index in range(experts)]
