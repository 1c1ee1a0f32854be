"""What cannot be adapted: refused by the layer's name, with a way out, before the model is changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pissa
from language_models import assert_same, snapshot
from pissa.layers.layer import PissaLayer


class Holder(nn.Module):
    """A model of the given modules, and a linear layer that can be adapted."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        for name, module in modules.items():
            self.add_module(name, module)


class OwnExperts(nn.Module):
    """Experts in one parameter, without what transformers' experts have."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(2, 8, 8))


class Doubled(nn.Linear):
    """A subclass may compute something else from the same weight."""


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in use
        return nn.utils.weight_norm(nn.Linear(8, 8))


def with_nan() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.weight.data[3, 5] = math.nan
    return linear


class Refused(NamedTuple):
    """A model, what is asked of it, and the message: it names the layer and what is the matter."""

    modules: Callable[[], dict[str, nn.Module]]
    fields: dict[str, Any]
    message: str


def one(module: Callable[[], nn.Module], message: str, **fields: Any) -> Refused:
    """The module is called `it` and targeted."""
    return Refused(lambda: {"it": module()}, {"target_modules": ["it"], **fields}, message)


REFUSED: dict[str, Refused] = {
    "grouped convolution": one(
        lambda: nn.Conv2d(8, 8, 3, groups=2),
        "it is a Conv2d with groups=2, whose weight is not one matrix; leave it out",
    ),
    "depthwise convolution": one(lambda: nn.Conv1d(8, 8, 3, groups=8), "it is a Conv1d with groups=8"),
    "transposed convolution": one(
        lambda: nn.ConvTranspose2d(8, 8, 3), "it is a .*ConvTranspose2d; PiSSA adapts nn.Linear"
    ),
    "LSTM": one(lambda: nn.LSTM(8, 8), "it is a .*LSTM"),
    "GRU": one(lambda: nn.GRU(8, 8), "it is a .*GRU"),
    "RNN": one(lambda: nn.RNN(8, 8), "it is a .*RNN"),
    "one step of an LSTM": one(lambda: nn.LSTMCell(8, 8), "it is a .*LSTMCell"),
    "attention": one(lambda: nn.MultiheadAttention(8, 2), "it is a .*MultiheadAttention"),
    "the output of attention": Refused(
        lambda: {"it": nn.MultiheadAttention(8, 2)},
        {"target_modules": ["out_proj"]},
        "it.out_proj is a .*NonDynamicallyQuantizableLinear",
    ),
    "a layer that its parent passes by": Refused(
        lambda: {"it": nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)},
        {"target_modules": ["linear1"]},
        r"it.linear1 is in a TransformerEncoderLayer, .*set_fastpath_enabled\(False\)",
    ),
    "Bilinear": one(lambda: nn.Bilinear(8, 8, 8), "it is a .*Bilinear"),
    "EmbeddingBag": one(lambda: nn.EmbeddingBag(8, 8), "it is a .*EmbeddingBag"),
    "embedding with max_norm": one(
        lambda: nn.Embedding(8, 8, max_norm=1.0),
        "it is an Embedding with max_norm=1.0, which changes its own weight; leave",
    ),
    "norm": one(lambda: nn.LayerNorm(8), "it is a .*LayerNorm"),
    "no weight": one(nn.Identity, "it is a .*Identity"),
    "container": one(lambda: nn.Sequential(nn.Linear(8, 8)), "it is a .*Sequential"),
    "subclass of Linear": one(lambda: Doubled(8, 8), "it is a .*test_refused.Doubled"),
    "parametrised weight": one(
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "it is a .*ParametrizedLinear"
    ),
    "weight made by a hook": one(weight_normed, "the weight of it is a Tensor of torch.float32"),
    "weight made later": one(lambda: nn.LazyLinear(8), "it is a .*LazyLinear"),
    "experts of their own kind": one(OwnExperts, "it is a OwnExperts, .* way of its own", target_modules="all-linear"),
    "float64": one(lambda: nn.Linear(8, 8, dtype=torch.float64), "the weight of it is a Parameter of torch.float64"),
    "meta device": one(lambda: nn.Linear(8, 8, device="meta"), "the weight of it is on the meta device"),
    "not finite": one(with_nan, "layer it: weight: contains NaN or Inf"),
    "rank of a linear layer": one(
        lambda: nn.Linear(8, 3),
        "rank 4 is too large for layer it: its weight is 3 x 8, so at most 3. "
        r"Give rank_pattern={'it': 3}, lower r, or leave it out with exclude_modules",
        r=4,
    ),
    "rank of a convolution": one(lambda: nn.Conv2d(1, 8, (1, 3)), "rank 4 is too large for layer it: .* 8 x 3", r=4),
    "rank of an embedding": one(lambda: nn.Embedding(8, 3), "rank 4 is too large for layer it: .* 3 x 8", r=4),
    "embedding in 4 bits": one(lambda: nn.Embedding(8, 8), "layer it is a Embedding.* cannot become nf4", quant="nf4"),
    "embedding in 8 bits": one(lambda: nn.Embedding(8, 8), "layer it is a Embedding.* become int8", quant="int8"),
    "convolution in 4 bits": one(lambda: nn.Conv2d(8, 8, 3), "layer it is a Conv2d.* cannot become nf4", quant="nf4"),
    "DoRA of a convolution": one(lambda: nn.Conv2d(8, 8, 3), "it is a Conv2d; use_dora", use_dora=True),
    "DoRA of an embedding": one(lambda: nn.Embedding(8, 8), "it is a Embedding; use_dora", use_dora=True),
    "a parameter": Refused(dict, {"target_parameters": ["proj.weight"]}, r"target_parameters: \['proj.weight'\]"),
    "an unknown name": Refused(dict, {"target_modules": ["nope"]}, "Target modules {'nope'} not found"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_and_nothing_is_changed(what: str) -> None:
    refused = REFUSED[what]
    model = Holder(**refused.modules())
    before = None if what == "weight made later" else snapshot(model)  # its values cannot be copied
    modules = dict(model.named_modules())
    with pytest.raises((TypeError, ValueError), match=refused.message):
        pissa.wrap(model, **{"r": 2, **refused.fields})
    assert dict(model.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    if before is not None:
        assert_same(model, before)


@pytest.mark.parametrize("what", [what for what, refused in REFUSED.items() if refused.modules()])
def test_the_rest_of_such_a_model_is_adapted(what: str) -> None:
    modules = REFUSED[what].modules()
    model = Holder(**modules)
    pissa.wrap(model, r=2, exclude_modules=rf"({'|'.join(modules)})(\..*)?")
    adapted = [name for name, module in model.named_modules() if isinstance(module, PissaLayer)]
    assert adapted == ["proj"]


class FewOperations(Tensor):
    """A tensor of a class that knows few operations, as torchao's do."""

    @staticmethod
    def __new__(cls, values: Tensor) -> FewOperations:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].values)
        raise NotImplementedError(f"{cls.__name__} dispatch: attempting to run unimplemented operator {function}")


def few_operations(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(FewOperations(layer.weight.detach()), requires_grad=False)


def torchao_int8(layer: nn.Linear) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())


@pytest.mark.parametrize("quantise", [few_operations, pytest.param(torchao_int8, marks=pytest.mark.slow)])
def test_a_tensor_of_torchao_is_refused(quantise: Callable[[nn.Linear], None]) -> None:
    """torchao takes 5 seconds to import, so that one of ours stands for its tensors but in `make test-slow`."""
    model = Holder(it=nn.Linear(8, 8))
    layer = model.get_submodule("it")
    quantise(layer)
    weight, modules = layer.weight, dict(model.named_modules())
    words = rf"weight of it is a {type(weight).__name__} .* plain float32, bfloat16 and float16 weights"
    with pytest.raises(TypeError, match=words):
        pissa.wrap(model, r=2)
    assert dict(model.named_modules()) == modules
    assert layer.weight is weight


def test_an_encoder_layer_without_its_fast_path_is_adapted() -> None:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        model = pissa.wrap(layer, r=2, target_modules=["linear1", "linear2"]).eval()
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            base = model(x)
            model.base_model.model.linear1.lora_B["default"].weight.fill_(1.0)
            adapted = model(x)
        assert not torch.equal(adapted, base)
        assert torch.equal(adapted, model.train()(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
