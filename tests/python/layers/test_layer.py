"""PissaLinear and the stored bases: function, gradients and merging, against the plain formula in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import devices
import language_models
import one_weight
import pissa
from devices import fetch, put
from language_models import error
from one_layer import OneLayer, filled
from oracle import assert_papers_function, base64, change64, change_a_little, deltas64, weight64
from pissa.base.start import StartFactors
from pissa.base.stored import QuantizedLinear

IN, OUT, R = 48, 40, 4
FORMS = {**language_models.EVERY_FORM, "nf4-single": {"quant": "nf4", "double_quant": False}}
forms = pytest.mark.parametrize("form", FORMS)
EPS = torch.finfo(torch.float32).eps


def toy(bias: bool = True, dtype: torch.dtype = torch.float32) -> OneLayer:
    return put(OneLayer(filled(nn.Linear(IN, OUT, bias=bias)).to(dtype)))


def inputs(*shape: int, seed: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    return put(torch.randn(*shape, IN, generator=torch.Generator().manual_seed(seed)).to(dtype))


def wrapped(form: str = "implicit", dtype: torch.dtype = torch.float32, **fields: object) -> nn.Module:
    return pissa.wrap(toy(dtype=dtype), r=R, **FORMS[form], **fields)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_that_models_ask_for_is_the_bases(form: str, dtype: torch.dtype) -> None:
    model = wrapped(form, dtype=dtype)
    layer = model.base_model.model.proj
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, layer.base.matrix().to(dtype))
    model.merge_adapter()
    assert layer.weight is layer.base_layer.weight


@forms
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_function_and_gradients_are_the_papers(form: str, fields: dict[str, object], bias: bool) -> None:
    model = pissa.wrap(toy(bias=bias), r=R, lora_alpha=3, **fields, **FORMS[form])
    assert_papers_function(model, inputs(2, 5))
    model.zero_grad()
    change_a_little(model.base_model.model.proj)
    assert_papers_function(model, inputs(2, 5))


@forms
@pytest.mark.parametrize("second", [{"r": R, "lora_alpha": 3}, {"r": 2}, {"r": R, "lora_alpha": 9}])
def test_active_adapters_add_up(form: str, second: dict[str, int]) -> None:
    model, x = wrapped(form, lora_alpha=3), inputs(5)
    model.add_adapter("second", pissa.PissaConfig(target_modules=["proj"], **second))
    layer = model.base_model.model.proj
    change_a_little(layer, "default", seed=3)
    change_a_little(layer, "second", seed=4)
    changes = {name: change64(layer, *deltas64(layer, name), name) for name in ("default", "second")}
    with torch.no_grad():
        for active in (["default"], ["second"], ["default", "second"]):
            model.base_model.set_adapter(active)
            weight = base64(layer) + sum(changes[name] for name in active)
            assert error(model(x), fetch(x).double() @ weight.T + fetch(layer.bias).double()) < IN * EPS, active


@forms
def test_a_scaled_adapter_is_a_scaled_change(form: str) -> None:
    """PEFT's set_scale, which diffusers uses: the change is scaled, never the base."""
    model, x = wrapped(form, lora_alpha=3), inputs(5)
    layer = model.base_model.model.proj
    change_a_little(layer)
    with torch.no_grad():
        layer.set_scale("default", 0.25)
        weight = weight64(layer, base64(layer), *deltas64(layer))  # of the scaling as it is now
        expected = fetch(x).double() @ weight.T + fetch(layer.bias).double()
        assert error(model(x), expected) < IN * EPS
        layer.unscale_layer()
        assert error(model(x), expected) > 1e-3


@forms
def test_same_rank_and_scaling_share_start_factors(form: str) -> None:
    model = wrapped(form)
    layer = model.base_model.model.proj
    model.add_adapter("same", pissa.PissaConfig(r=R, target_modules=["proj"]))
    model.add_adapter("rank", pissa.PissaConfig(r=2, target_modules=["proj"]))
    model.add_adapter("scaled", pissa.PissaConfig(r=R, lora_alpha=2 * R, target_modules=["proj"]))
    for name in ("zero", "same zero"):
        model.add_adapter(name, pissa.PissaConfig(r=R, init="lora", target_modules=["proj"]))
    assert layer.start_of("same zero") is layer.start_of("zero")
    assert layer.start_of("same").a0 is layer.start_of("default").a0
    assert layer.start_of("same").b0 is layer.start_of("default").b0
    for other in ("rank", "scaled", "zero"):
        assert layer.start_of(other) is not layer.start_of("default")
    # the base function stays, so that another rank decomposes what the base computes
    split = one_weight.split(base64(layer).float(), 2)
    assert error(layer.start_of("rank").b0 @ layer.start_of("rank").a0, split.b0 @ split.a0) < 1e-4


def test_a_start_is_shared_with_an_equal_one_only() -> None:
    """Files from another machine have the same origin, and may have other bits."""
    model = wrapped()
    layer = model.base_model.model.proj
    own = layer.start_of("default")
    for a0, b0, same in (
        (own.a0.clone(), own.b0.clone(), True),
        (own.a0.clone(), 2 * own.b0, False),
        (2 * own.a0, own.b0.clone(), False),
    ):
        start = StartFactors(a0, b0, own.origin)
        layer.share_start("other", start)
        assert layer.start_of("other") is (own if same else start)
        del layer.lora_start["other"]


@pytest.mark.parametrize("form", ["explicit", "nf4"])
def test_unloading_a_stored_base_rounds_it_to_its_dtype(form: str) -> None:
    model = wrapped(form, dtype=torch.bfloat16)
    expected = model.base_model.model.proj.base.matrix().bfloat16()
    weight = model.unload().proj.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("form", ["explicit", "nf4"])
def test_the_base_survives_its_adapter(form: str) -> None:
    model, x = wrapped(form), inputs(5)
    with torch.no_grad():
        before = model(x)
        model.add_adapter("second", pissa.PissaConfig(r=2, target_modules=["proj"]))
        model.set_adapter("second")
        model.delete_adapter("default")
        assert error(model(x), before) < IN * EPS
        with model.disable_adapter():
            assert torch.equal(model(x), before)
    layer = model.base_model.model.proj
    model.add_adapter("third", pissa.PissaConfig(r=R, target_modules=["proj"]))
    assert layer.start_of("third") is layer.base_layer.start

    for name in ("third", "second"):
        model.delete_adapter(name)
    model.add_adapter("alone", pissa.PissaConfig(r=2, target_modules=["proj"], **FORMS[form]))
    model.set_adapter("alone")
    with torch.no_grad():
        assert error(model(x), before) < IN * EPS


@forms
def test_merge_rounds_once_and_unmerge_is_exact(form: str) -> None:
    model, x = wrapped(form, dtype=torch.bfloat16, lora_alpha=3), inputs(5, dtype=torch.bfloat16)
    layer = model.base_model.model.proj
    if form == "implicit":  # untrained, the weight keeps its bits
        untrained = copy.deepcopy(model).merge_and_unload().proj.weight
        assert torch.equal(untrained, toy(dtype=torch.bfloat16).proj.weight)
    change_a_little(layer, size=0.1)
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    before = layer.base_layer
    state = {name: tensor.clone() for name, tensor in before.state_dict().items()}

    model.merge_adapter()
    expected = weight64(layer, base64(layer), *deltas64(layer))
    assert type(layer.base_layer) is nn.Linear
    assert layer.base_layer.weight.dtype == torch.bfloat16
    exact = fetch(layer.base_layer.weight) == expected.to(torch.bfloat16)
    assert exact.float().mean() > 0.99  # all but ties that float32 decides the other way
    with torch.no_grad():
        merged = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), merged)  # which it is still
    assert not torch.equal(merged, base)
    model.unmerge_adapter()
    assert layer.base_layer is before
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.state_dict().items())


def test_merging_one_adapter_after_another_is_merging_both() -> None:
    model = wrapped()
    layer = model.base_model.model.proj
    model.add_adapter("second", pissa.PissaConfig(r=2, target_modules=["proj"]))
    change_a_little(layer, "default", seed=3)
    change_a_little(layer, "second", seed=4)
    model.merge_adapter(["default", "second"])
    both = layer.base_layer.weight.clone()
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["second"])
    assert torch.equal(layer.base_layer.weight, both)
    assert layer.merged_adapters == ["default", "second"]


def test_safe_merge_changes_nothing_when_it_fails() -> None:
    model = wrapped()
    layer = model.base_model.model.proj
    before = layer.base_layer
    layer.lora_A["default"].weight.data[0, 0] = math.nan
    layer.lora_B["default"].weight.data.fill_(1.0)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        model.merge_adapter(safe_merge=True)
    assert layer.base_layer is before
    assert not layer.merged


@forms
def test_dropout_touches_only_the_change(form: str) -> None:
    model = wrapped(form, lora_dropout=0.5)
    layer, x = model.base_model.model.proj, inputs(64)
    model.train()
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        assert torch.equal(model(x), base)  # step 0
        change_a_little(layer, size=0.1)
        torch.manual_seed(0)
        dropped = model(x) - base
        torch.manual_seed(0)
        mask = nn.functional.dropout(torch.ones_like(x), 0.5)
        assert error(dropped, (x * mask) @ layer.get_delta_weight("default").T) < 1e-5
        assert error(model.eval()(x) - base, x @ layer.get_delta_weight("default").T) < 1e-5


@forms
def test_autocast_strides_and_empty_batches(form: str) -> None:
    model, x = wrapped(form), inputs(6, 5)
    layer = model.base_model.model.proj
    change_a_little(layer, size=0.1)
    expected = model(x)
    with torch.autocast(devices.current.type, torch.bfloat16):
        rounded = model(x)
        with model.disable_adapter():
            assert model(x).dtype == torch.bfloat16
    assert rounded.dtype == torch.bfloat16
    assert error(rounded, expected) < 2 * torch.finfo(torch.bfloat16).eps
    assert error(model(inputs(5, 6).transpose(0, 1)), model(inputs(5, 6)).transpose(0, 1)) < EPS * IN
    assert model(x[:0]).shape == (0, 5, OUT)


@forms
def test_adapter_names_give_each_row_its_adapter(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = wrapped(form).eval(), inputs(4)
    layer = model.base_model.model.proj
    model.add_adapter("second", pissa.PissaConfig(r=2, target_modules=["proj"], use_dora=True))
    change_a_little(layer, "default", seed=3)
    change_a_little(layer, "second", seed=4)
    rows: list[int] = []  # that the base computes, alone or by one product with an adapter
    layer.base_layer.register_forward_hook(lambda module, args, y: rows.append(len(args[0])))
    base = type(layer.base)
    operand_for = base.operand_for

    def counted(self: Any, start: Any, scaling: float, x: Tensor) -> Any:
        operand = operand_for(self, start, scaling, x)
        rows.extend([len(x)] if operand else [])
        return operand

    monkeypatch.setattr(base, "operand_for", counted)
    with torch.no_grad():
        mixed = model(x, adapter_names=["second", "__base__", "default", "second"])
        assert rows == [4]
        with model.disable_adapter():
            assert error(mixed[1], model(x)[1]) < EPS * IN
        assert error(mixed[2], model(x)[2]) < EPS * IN
        model.set_adapter("second")
        assert error(mixed[[0, 3]], model(x)[[0, 3]]) < EPS * IN
        expected = model(x)
        with pytest.raises(ValueError, match=r"Length of `adapter_names`.* got 1 and 4 respectively, in layer proj"):
            model(x, adapter_names=["default"])
        assert torch.equal(model(x), expected)
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            model(x, adapter_names=["default"] * 4)


@forms
def test_rounding_the_model_keeps_the_base_function(form: str) -> None:
    """model.half() must not touch start factors and scales."""
    model = wrapped(form)
    layer = model.base_model.model.proj
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    model.half()
    after = dict(layer.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert layer.bias.dtype == torch.float16


@forms
def test_copies_share_what_the_original_shares(form: str) -> None:
    model, x = wrapped(form), inputs(5)
    model.add_adapter("same", pissa.PissaConfig(r=R, target_modules=["proj"]))
    change_a_little(model.base_model.model.proj)
    twin = copy.deepcopy(model)
    layer = twin.base_model.model.proj
    assert layer.start_of("same") is layer.start_of("default")
    assert layer.start_of("same") is not model.base_model.model.proj.start_of("same")
    assert torch.equal(twin(x), model(x))


def test_nf4_holds_four_bits() -> None:
    linear = wrapped("nf4").base_model.model.proj.base_layer
    assert isinstance(linear, QuantizedLinear)
    assert (linear.weight.dtype, linear.weight.numel()) == (torch.uint8, IN * OUT // 2)
    assert not linear.weight.requires_grad
    assert "form=nf4, double_quant=True" in repr(linear)


def test_int8_holds_eight_bits_and_a_scale_for_each_row() -> None:
    layer = wrapped("int8").base_model.model.proj
    linear = layer.base_layer
    assert isinstance(linear, QuantizedLinear)
    assert (linear.weight.dtype, linear.weight.numel()) == (torch.uint8, IN * OUT)
    assert (linear.absmax.dtype, linear.absmax.shape, linear.nested_absmax) == (torch.float32, (OUT,), None)
    assert linear.form == pissa.PissaConfig(quant="int8").form
    assert linear.extra_repr().endswith("bias=True, form=int8")
    assert error(layer.base.matrix(), toy().proj.weight) < 0.01
