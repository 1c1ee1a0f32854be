"""Checks of the ops on a device for which there is no kernel (other_device.py), for a process of its own: torch has one
private device a process, and what asks torch for an accelerator gets it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import one_weight
import other_device
from pissa import ops
from pissa.notices import CompositeWarning

OTHER = other_device.register()
DEVICES = (torch.device("cpu"), OTHER)


def on(device: torch.device, value: Any) -> Any:
    if isinstance(value, ops.QuantizedWeight):
        return ops.QuantizedWeight(*(on(device, part) for part in value))
    if isinstance(value, Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    return [on(device, item) for item in value] if isinstance(value, list) else value


def a_layer_says_once_what_computes_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = ops.quantize(torch.randn(48, 64, generator=generator))
    x = torch.randn(3, 5, 64, generator=generator).requires_grad_()
    a, b = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((4, 64), (48, 4)))
    a0, b0 = torch.randn(4, 64, generator=generator), torch.randn(48, 4, generator=generator)
    found = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", CompositeWarning)
        for device in DEVICES:
            x_there, a_there, b_there = on(device, [x, a, b])
            factors = dict(zip(("a", "b", "a0", "b0"), [a_there, b_there, *on(device, [a0, b0])], strict=True))
            y = ops.linear(x_there, on(device, weight), **factors, implicit=True)
            assert y.device.type == device.type
            found.append([y, *torch.autograd.grad(y.square().sum(), [x_there, a_there, b_there])])
    for mine, theirs in zip(*found, strict=True):
        assert (theirs.cpu() - mine).norm() <= 64 * 2**-24 * mine.norm()  # sums of up to 64 terms
    (warning,) = said
    assert "on other:0 PyTorch's operations compute" in str(warning.message)
    assert "they are for the CPU and CUDA" in str(warning.message)


def a_start_has_the_bits_of_the_cpu() -> None:
    dense = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    here, there = (one_weight.split(on(device, dense), 4, form="nf4") for device in DEVICES)
    assert isinstance(here.residual, ops.QuantizedWeight)
    assert isinstance(there.residual, ops.QuantizedWeight)
    parts = zip((here.a0, here.b0, *here.residual[:4]), (there.a0, there.b0, *there.residual[:4]), strict=True)
    for mine, theirs in parts:
        assert theirs.device.type == OTHER.type
        assert torch.equal(theirs.cpu(), mine)


def wrong_arguments_are_named() -> None:
    weight = on(OTHER, ops.quantize(torch.ones(48, 64)))
    with pytest.raises(ValueError, match=r"^weight\.absmax: got 47 elements; needed: 48"):
        ops.linear(torch.ones(2, 64, device=OTHER), weight._replace(absmax=weight.absmax[1:]))


if __name__ == "__main__":
    for check in (a_layer_says_once_what_computes_it, a_start_has_the_bits_of_the_cpu, wrong_arguments_are_named):
        check()
        print(check.__name__)
