"""What every kind of base answers to the questions of `base.protocol`: that its answers are of one function."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import devices
from devices import fetch, put
from one_layer import OneLayer, adapted, filled, wrap
from pissa.base.classes import adopt, base_of
from pissa.base.protocol import Base
from pissa.base.stored import residual_from, residual_shapes, residual_tensors
from pissa.config import IMPLICIT
from reference import EPS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb

IN, OUT = 40, 24


def stored(**fields: object) -> Callable[[], Base]:
    return lambda: adapted(wrap(put(filled(nn.Linear(IN, OUT))), r=3, **fields)).base


def taken(layer: Callable[[], nn.Module]) -> Callable[[], Base]:
    def make() -> Base:
        base = adopt(put(filled(layer())))
        assert base is not None
        return base

    return make


def offloaded() -> Base:
    layer = filled(nn.Linear(IN, OUT))
    cpu_offload(OneLayer(layer), execution_device=devices.current)
    return base_of(layer)


BASES: dict[str, Callable[[], Base]] = {
    "linear": taken(lambda: nn.Linear(IN, OUT)),
    "without bias": taken(lambda: nn.Linear(IN, OUT, bias=False)),
    "offloaded": offloaded,
    "conv1d of transformers": taken(lambda: Conv1D(OUT, IN)),
    "embedding": taken(lambda: nn.Embedding(IN, OUT)),
    "convolution": taken(lambda: nn.Conv2d(10, OUT, (2, 2), padding=1)),
    "explicit": stored(residual="explicit"),
    "nf4": stored(quant="nf4"),
    "nf4 with float32 scales": stored(quant="nf4", double_quant=False),
    "int8": stored(quant="int8"),
    "nf4 in bfloat16": stored(quant="nf4", quant_storage="bfloat16"),
    "conv1d in int8": lambda: adapted(wrap(put(filled(Conv1D(OUT, IN))), r=3, quant="int8")).base,
    "conv1d in nf4": lambda: adapted(wrap(put(filled(Conv1D(OUT, IN))), r=3, quant="nf4")).base,
    "4 bits of bitsandbytes": taken(lambda: bnb.nn.Linear4bit(IN, OUT, quant_type="nf4")),
    "8 bits of bitsandbytes": taken(lambda: bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)),
}
bases = pytest.mark.parametrize("name", BASES)


def output(base: Base, module: nn.Module) -> Tensor:
    """The module's output for one input of its kind, the same for every base."""
    if base.module_class is nn.Embedding:
        return module(put(torch.arange(IN)))
    shape = (2, 10, 5, 5) if base.module_class is nn.Conv2d else (5, IN)
    return module(put(torch.randn(*shape, generator=torch.Generator().manual_seed(1))))


@bases
def test_the_matrix_is_of_the_function(name: str) -> None:
    """Times inputs it is what the module computes."""
    base = BASES[name]()
    matrix = base.matrix().detach()
    assert matrix.shape == (OUT, IN)
    assert base.device == matrix.device == put(torch.empty(0)).device
    x = put(torch.randn(5, IN, generator=torch.Generator().manual_seed(1)))
    expected, size = x.double() @ matrix.double().mT, x.double().abs() @ matrix.double().abs().mT
    assert ((base.product(x).double() - expected).abs() <= (IN + 8) * EPS[torch.float32] * size).all()
    if base.module_class in (nn.Linear, Conv1D):
        y = base.module(x).detach().double() - (0 if base.bias is None else fetch(base.bias.detach()).to(x))
        # bitsandbytes rounds the input of an 8-bit layer to 8 bits, too.
        unit = 2**-6 if "8 bits" in name else (IN + 8) * EPS[torch.float32]
        assert ((y - expected).abs() <= unit * (size.amax() if "8 bits" in name else size) + unit).all()


@bases
def test_a_twin_is_a_dense_module_of_its_kind_over_another_matrix(name: str) -> None:
    base = BASES[name]()
    matrix = put(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2)))
    twin = base_of(base.dense_module(matrix))
    assert torch.equal(twin.matrix().detach(), matrix)
    assert (twin.module_class, twin.form, twin.is_quantised) == (base.module_class, IMPLICIT, False)
    assert type(twin.module) is base.dense_type
    assert not twin.parameter.requires_grad
    assert (twin.bias is None) == (base.bias is None)
    if twin.bias is not None and base.bias is not None:
        assert torch.equal(twin.bias, base.bias)
    assert twin.parameter.shape == base.as_weight(matrix).shape
    assert not torch.equal(base.matrix().detach(), matrix)
    assert output(base, twin.module).shape == output(base, base.module).shape


@bases
def test_what_is_restored_computes_the_same(name: str) -> None:
    base = BASES[name]()
    restored = base.restore_module()
    found, expected = output(base, restored), output(base, base.module)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (restored is base.module) == (base.start is None and "4 bits" not in name)


@bases
def test_the_form_agrees_with_what_is_kept(name: str) -> None:
    base = BASES[name]()
    assert [base.form == IMPLICIT] * 3 == [part is None for part in (base.start, base.residual, base.fingerprint)]
    assert base.is_quantised == ("bitsandbytes" in name)
    assert base.dtype == (None if base.is_quantised else torch.float32)
    shown = base.shown_weight(torch.bfloat16)
    assert shown is base.parameter or torch.equal(shown, base.matrix().to(torch.bfloat16))
    if name not in ("offloaded", "8 bits of bitsandbytes"):  # the one has no weight here, the other scales beside it
        other = base.with_parameter(base.parameter.detach().clone())
        assert torch.equal(other.matrix(), base.matrix())
        assert other.parameter is not base.parameter


@pytest.mark.parametrize("name", ["explicit", "nf4", "int8", "conv1d in nf4", "4 bits of bitsandbytes"])
def test_a_weight_is_decoded_only_when_its_values_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 asks each feed-forward for the dtype of its weight, in every pass."""
    base: Any = BASES[name]()
    matrix, decoded = base.matrix(), []
    monkeypatch.setattr(type(base), "matrix", lambda self: decoded.append(1) or matrix)
    shown = base.shown_weight(torch.bfloat16)
    assert isinstance(shown, Tensor)
    assert (shown.dtype, shown.shape, shown.device) == (torch.bfloat16, matrix.shape, matrix.device)
    assert (shown.ndim, shown.dim(), shown.numel(), shown.size(0)) == (2, 2, OUT * IN, OUT)
    assert shown.is_floating_point()
    assert not shown.requires_grad
    assert not decoded
    x = torch.randn(3, IN, dtype=torch.bfloat16, device=matrix.device)
    reads = (torch.clone, Tensor.detach, Tensor.tolist, Tensor.sum, copy.deepcopy, lambda weight: x @ weight.mT)
    for number, read in enumerate(reads, start=1):
        found, expected = read(shown), read(matrix.bfloat16())
        assert type(found) is type(expected)
        assert found == expected if isinstance(found, list) else torch.equal(found, expected)
        assert len(decoded) == number


@pytest.mark.parametrize("name", [name for name in BASES if name == "explicit" or "nf4" in name])
def test_a_residual_is_kept_in_the_tensors_that_its_form_needs(name: str) -> None:
    base: Any = BASES[name]()
    tensors, needed = residual_tensors(base.residual), residual_shapes(base.form, (OUT, IN))
    assert list(tensors) == list(needed)
    for part, (shape, dtypes) in needed.items():
        assert tensors[part].shape == shape
        assert tensors[part].dtype in dtypes
    again = residual_tensors(residual_from(tensors, base.form, (OUT, IN)))
    assert all(torch.equal(again[part], tensor) for part, tensor in tensors.items())


@bases
def test_an_operand_is_the_bases_weight(name: str) -> None:
    """A stored base offers its residual to the adapters that start where it does, and quantised codes go to all."""
    base: Any = BASES[name]()
    start = base.start or adapted(wrap(put(filled(nn.Linear(IN, OUT))), r=3)).start_of("default")
    found = base.operand_for(start, start.origin.scaling, torch.zeros(20, IN))
    if base.start is not None:
        weight, implicit = found
        assert not implicit
        assert weight is base.residual or all(
            torch.equal(got, kept) if isinstance(got, Tensor) else got == kept
            for got, kept in zip(weight, base.residual, strict=True)
        )
        assert base.operand_for(start, 2 * start.origin.scaling, torch.zeros(20, IN)) is None
    else:
        assert (found is not None) == ("4 bits" in name)
        assert found is None or found[1]
