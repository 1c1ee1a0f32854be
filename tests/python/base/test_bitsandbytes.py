"""bitsandbytes' layers: their bytes are the base as they are, or are decoded, split and stored anew where one asks."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import one_weight
import pissa
from bnb_layers import IN, OUT, R, bnb, contents, decoded, inputs, linear4bit, linear8bit, nesting, storages
from devices import fetch, put
from language_models import Make, assert_same, error, logits, snapshot, train
from one_layer import (
    OneLayer,
    adapted,
    assert_comes_back,
    assert_function_and_gradients,
    assert_merges,
    unit_error,
    wrap,
)
from oracle import change_a_little, deltas64, weight64
from pissa import notices, ops
from pissa.base.bitsandbytes import BnbLinear4bit
from pissa.base.classes import decoded_module, has_codes
from pissa.base.stored import QuantizedLinear, ResidualLinear
from reference import EPS, assert_close
from torch_settings import default_dtype

# ---- 4 bits, taken as they are ---------------------------------------------------------------------------------------


@storages
@nesting
def test_the_bytes_are_kept(nested: bool, storage: torch.dtype) -> None:
    layer = linear4bit(nested, storage)
    before = contents(layer)
    base = adapted(wrap(layer, r=R)).base_layer
    assert isinstance(base, BnbLinear4bit)
    assert base.weight.data_ptr() == layer.weight.data_ptr()  # no copy
    assert base.weight.dtype == layer.weight.dtype
    assert not base.weight.requires_grad
    assert base.double_quant == nested
    assert torch.equal(fetch(base.matrix()).double(), decoded(layer))
    assert all(torch.equal(contents(layer)[name], value) for name, value in before.items())


@storages
@nesting
def test_codes_are_never_decomposed(nested: bool, storage: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a float quant_storage the packed codes look like a weight."""
    split_many, seen = ops.split_many, []

    def watched(weights: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.extend(weights)
        return split_many(weights, *args, **kwargs)

    monkeypatch.setattr(ops, "split_many", watched)
    layer = linear4bit(nested, storage)
    start = adapted(wrap(layer, r=R, seed=5)).start_of("default")
    (weight,) = seen
    assert weight.dtype == torch.float32
    assert torch.equal(fetch(weight).double(), decoded(layer))
    split = one_weight.split(weight, R, seed=5)
    assert torch.equal(start.a0, split.a0)
    assert torch.equal(start.b0, split.b0)


@nesting
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_step_0_is_what_bitsandbytes_computes(nested: bool, dtype: torch.dtype) -> None:
    """Up to the rounding of either: bitsandbytes rounds the decoded weight to the dtype of the input."""
    layer, x = linear4bit(nested, dtype=dtype), inputs(5, dtype=dtype)
    model = wrap(linear4bit(nested, dtype=dtype), r=R)
    with torch.no_grad():
        theirs, ours = fetch(layer(x)).double(), model(x)
        with model.disable_adapter():
            disabled = model(x)
    size = fetch(x).double().abs() @ decoded(layer).abs().T + fetch(layer.bias).double().abs()
    rounding = 0.0 if dtype == torch.float32 else 4 * EPS[dtype]  # of weights and outputs, theirs and ours
    assert_close(ours, theirs, (2 * IN * EPS[torch.float32] + rounding) * size, "step 0")
    assert torch.equal(disabled, ours)


def test_the_base_computes_in_its_compute_dtype_and_the_change_in_the_inputs() -> None:
    """With bnb_4bit_compute_dtype the base rounds as bitsandbytes does, for speed; what is learnt is not rounded."""

    def make() -> Any:
        layer = linear4bit()
        layer.compute_dtype, layer.compute_type_is_set = torch.bfloat16, True
        return layer

    x, bases = inputs(5), []
    for dtype in (torch.float32, torch.bfloat16):
        model = wrap(make(), r=R)
        with torch.no_grad():
            base = model(x.to(dtype))
            assert base.dtype == dtype
            bases.append(base.float())
    assert torch.equal(*bases)  # float32 inputs are rounded first, and nothing else happens to them
    size = fetch(x).double().abs() @ decoded(make()).abs().T + 1
    assert_close(bases[0], fetch(make()(x).detach()).double(), 4 * EPS[torch.bfloat16] * size, "bitsandbytes")

    model = wrap(make(), r=R)
    change_a_little(adapted(model), size=0.01)
    delta = fetch(adapted(model).get_delta_weight("default").detach()).double()
    expected = fetch(bases[0]).double() + fetch(x).double() @ delta.T
    sizes = weight64(adapted(model), 0 * delta, *(d.detach().abs() for d in deltas64(adapted(model))), absolute=True)
    bound = unit_error(adapted(model), IN) * (fetch(x).double().abs() @ sizes.T)
    assert_close(model(x).detach(), expected, bound, "change")
    assert model.unload().proj.compute_dtype == torch.bfloat16


@nesting
@pytest.mark.parametrize("bias", [False, True])
def test_function_and_gradients(nested: bool, bias: bool) -> None:
    layer, x = linear4bit(nested, bias=bias), inputs(2, 5).requires_grad_()
    base, offset = decoded(layer), fetch(layer.bias.detach()).double() if bias else None
    assert_function_and_gradients(wrap(layer, r=R, lora_alpha=3), x, base, offset, F.linear, terms=IN + OUT)


@nesting
def test_merging_gives_a_dense_layer_of_the_models_dtype(nested: bool) -> None:
    layer = linear4bit(nested)
    merged = assert_merges(wrap(layer, r=R, lora_alpha=3), decoded(layer))
    assert type(merged) is nn.Linear
    assert merged.bias is layer.bias

    norm, layer = nn.LayerNorm(IN).bfloat16(), linear4bit(nested, bias=False)  # which says nothing of its dtype
    model = pissa.wrap(put(nn.Sequential(norm, layer)), r=R, target_modules=["1"])
    merged = model.merge_and_unload()
    assert merged[1].weight.dtype == torch.bfloat16
    assert merged(inputs(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


@storages
@nesting
@pytest.mark.parametrize("deleted", [False, True])
def test_unloading_gives_bitsandbytes_its_layer_back(nested: bool, storage: torch.dtype, deleted: bool) -> None:
    layer, x = linear4bit(nested, storage), inputs(3)
    before, output = contents(layer), layer(x)
    model = wrap(layer, r=R)
    change_a_little(adapted(model))
    if deleted:
        model.delete_adapter("default")
    with default_dtype(torch.bfloat16):
        back = model.unload().proj
    assert type(back) is bnb.nn.Linear4bit
    assert back.weight.data_ptr() == layer.weight.data_ptr()
    assert contents(back).keys() == before.keys()
    assert all(torch.equal(contents(back)[name], value) for name, value in before.items())
    assert torch.equal(back(x), output)
    assert (back.weight.quant_storage, back.weight.dtype) == (storage, storage)
    assert back.weight.quant_state is back.quant_state
    assert back.weight.quant_state == layer.weight.quant_state
    assert (back.compute_dtype, back.in_features) == (layer.compute_dtype, IN)
    again = wrap(back, r=R)
    assert torch.equal(adapted(again).start_of("default").a0, adapted(wrap(layer, r=R)).start_of("default").a0)


def test_evaluation_does_not_repack_the_bytes() -> None:
    """bitsandbytes on a CPU repacks its weights in eval() and then has no gradient."""
    layer, x = linear4bit(), inputs(3)
    model = wrap(layer, r=R)
    before = contents(layer)
    with torch.no_grad():
        model.eval()(x)
    assert all(torch.equal(contents(layer)[name], value) for name, value in before.items())
    model.train()(x).sum().backward()
    assert adapted(model).lora_B["default"].weight.grad.abs().max() > 0


def test_copies_and_moves_take_the_bytes_along() -> None:
    model, x = wrap(linear4bit(), r=R), inputs(3)
    change_a_little(adapted(model))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    half = copy.deepcopy(model).half()
    assert torch.equal(adapted(half).base_layer.matrix(), adapted(model).base_layer.matrix())
    assert adapted(half).base_layer.absmax.dtype == torch.uint8
    back = twin.unload().proj
    assert torch.equal(decoded(back), decoded(model.unload().proj))


# ---- 4 bits, stored anew ---------------------------------------------------------------------------------------------


@storages
@nesting
def test_quant_decodes_splits_and_quantises_again_with_one_warning(nested: bool, storage: torch.dtype) -> None:
    model = nn.ModuleDict({name: linear4bit(nested, storage) for name in ("first", "second")})
    weights = {name: bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state) for name, m in model.items()}
    with pytest.warns(
        notices.RequantizedWarning, match=r"^2 of 2 layers are quantised already, first the first\."
    ) as said:
        wrapped = pissa.wrap(model, r=R, target_modules=["first", "second"], quant="nf4", seed=5)
    assert len(said) == 1
    assert "stored as nf4 (double_quant True), which rounds a second time" in str(said[0].message)
    assert said[0].filename == __file__
    for name, weight in weights.items():
        base = wrapped.base_model.model[name].base_layer
        split = one_weight.split(weight.float(), R, seed=5, form="nf4")
        assert isinstance(base, QuantizedLinear)
        assert torch.equal(base.residual.codes, split.residual.codes)
        assert torch.equal(base.residual.absmax, split.residual.absmax)
        assert torch.equal(base.start.a0, split.a0)


@pytest.mark.parametrize(
    ("make", "fields", "base"),
    [
        (linear4bit, {"residual": "explicit"}, ResidualLinear),
        (linear4bit, {"quant": "nf4"}, QuantizedLinear),
        (linear8bit, {"quant": "nf4"}, QuantizedLinear),
    ],
)
@pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")
def test_what_was_stored_anew_says_so_and_comes_back(
    make: Any, fields: dict[str, Any], base: Any, tmp_path: Path
) -> None:
    with pytest.warns(notices.RequantizedWarning, match=r"1 of 1 layers .*, proj the first\. .* stored as"):
        model = wrap(make(), r=R, **fields)
    assert isinstance(adapted(model).base_layer, base)
    assert_comes_back(model, make, inputs(3), tmp_path)
    assert type(model.unload().proj) is nn.Linear


# ---- What is refused -------------------------------------------------------------------------------------------------


def not_quantised() -> Any:
    return bnb.nn.Linear4bit(IN, OUT, quant_type="nf4")


def in_16_bits() -> Any:
    return bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=True)


def not_quantised_8bit() -> Any:
    return bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: linear4bit(quant_type="fp4"),
            "a Linear4bit of bitsandbytes, but its weight is quantised as fp4; load",
        ),
        (not_quantised, "a Linear4bit of bitsandbytes, but its weight is not quantised yet: move the model"),
        (in_16_bits, "a Linear8bitLt of bitsandbytes, but it keeps its weight in 16 bits"),
        (not_quantised_8bit, "a Linear8bitLt of bitsandbytes, but its weight is not quantised yet: move the model"),
        (lambda: bnb.nn.LinearFP4(IN, OUT), "proj is a bitsandbytes.nn.modules.LinearFP4; PiSSA adapts nn.Linear"),
    ],
)
@pytest.mark.parametrize("fields", [{}, {"quant": "nf4"}], ids=str)
def test_what_is_refused_stays_as_it_was(make: Any, words: str, fields: dict[str, Any]) -> None:
    model = OneLayer(make())
    before = snapshot(model)
    with pytest.raises(TypeError, match=f"proj is {words}" if words.startswith("a ") else words):
        pissa.wrap(model, r=R, target_modules=["proj"], **fields)
    assert_same(model, before)


@pytest.mark.cpu_only
def test_a_layer_that_bitsandbytes_has_repacked_is_refused() -> None:
    """In eval() on a CPU with AVX512-BF16: the flag is set by hand so that the test holds on any."""
    layer, x = linear4bit(dtype=torch.bfloat16), inputs(2, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.eval()(x)
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(TypeError, match="bitsandbytes has repacked its weight for evaluation: load the model anew"):
        wrap(layer, r=R)


@pytest.mark.cpu_only
@nesting
def test_a_layer_without_an_adapter_is_evaluated_and_saved(nested: bool) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes would repack it, and not find back when its state dict is taken."""
    other, x = linear4bit(nested, dtype=torch.bfloat16), inputs(20, dtype=torch.bfloat16)
    model = pissa.wrap(nn.ModuleDict({"proj": linear4bit(), "other": other}), r=R, target_modules=["proj"])
    expected = other(x)
    with torch.no_grad():
        model.eval()
        assert error(other(x), expected) < 2 * EPS[torch.bfloat16]
        model.state_dict()
        for is_training in (True, False):
            assert error(other.train(is_training)(x), expected) < 2 * EPS[torch.bfloat16]


@nesting
def test_layers_without_an_adapter_are_decoded(nested: bool) -> None:
    for layer in (linear4bit(nested), linear8bit()):
        weight = decoded(layer)
        dense: Any = decoded_module(layer, torch.float32)
        assert type(dense) is nn.Linear
        assert dense.bias is layer.bias
        assert_close(dense.weight, weight, 2 * EPS[torch.float32] * weight.abs(), "decoded")
    layer = linear4bit(quant_type="fp4")
    assert has_codes(layer)
    assert decoded_module(layer, torch.float32) is None


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


def test_8_bits_stay_and_step_0_is_bitsandbytes_to_the_bit() -> None:
    layer, x = linear8bit(), inputs(5)
    weight = decoded(layer)
    model = wrap(layer, r=R)
    assert adapted(model).base_layer is layer
    assert layer.weight.dtype == torch.int8
    assert_close(adapted(model).base.matrix(), weight, 2 * EPS[torch.float32] * weight.abs(), "decoded")
    expected = linear8bit()(x)
    for _ in range(2):  # the layer keeps its scales elsewhere once it has been called
        assert torch.equal(model(x), expected)
        assert_close(adapted(model).base.matrix(), weight, 2 * EPS[torch.float32] * weight.abs(), "decoded")
    change_a_little(adapted(model))
    assert not torch.equal(model(x), expected)
    assert model.unload().proj is layer
    assert torch.equal(layer(x), expected)


def test_8_bits_change_and_gradients() -> None:
    """The change on top of bitsandbytes' own output, which rounds the input to 8 bits."""
    layer, x = linear8bit(), inputs(5)
    theirs, weight = linear8bit()(x).detach(), decoded(layer)
    model = wrap(layer, r=R, lora_alpha=3)
    change_a_little(adapted(model))
    delta = fetch(adapted(model).get_delta_weight("default").detach()).double()
    size = fetch(x).double().abs() @ delta.abs().T + fetch(theirs).double().abs()
    expected = fetch(theirs).double() + fetch(x).double() @ delta.T
    assert_close(model(x).detach(), expected, (IN + 2 * R) * EPS[torch.float32] * size, "change")
    model(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapted(model).factor_parameters("default"))
    merged = model.merge_and_unload().proj
    assert type(merged) is nn.Linear
    assert_close(merged.weight.detach(), weight + delta, 8 * EPS[torch.float32] * weight.abs().max(), "merged")


# ---- A whole model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_model_that_transformers_has_loaded_quantised(
    bits: int, prepared: bool, tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    """Its quantised layers compute in bfloat16. Its activations are float32 once PEFT has prepared it for training:
    then a merged weight is too."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(dtype=torch.bfloat16, intermediate_size=128).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_8bit=True)
    if bits == 4:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,
        )
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, dtype=torch.bfloat16, device_map=str(tokens.device)
    ).train()
    if prepared:
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    before = logits(base, tokens)
    model = pissa.wrap(base, r=R)
    assert error(logits(model, tokens), before) < 4 * EPS[torch.bfloat16]  # two layers
    losses = train(model, tokens)
    assert losses[-1] < losses[0]
    trained = logits(model, tokens)

    model.merge_adapter()
    dtypes = {layer.base_layer.weight.dtype for layer in model.modules() if isinstance(layer, pissa.layers.PissaLinear)}
    assert dtypes == {torch.float32 if prepared else torch.bfloat16}
    assert error(logits(model, tokens), trained) < 8 * EPS[torch.bfloat16]  # weights and activations of two layers
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), trained)

    unloaded = model.unload()
    assert torch.equal(logits(unloaded.train(), tokens), before)
    unloaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map=str(tokens.device)).train()
    assert error(logits(again, tokens), before) < 4 * EPS[torch.bfloat16]


# ---- A model of transformers, saved without its adapters -------------------------------------------------------------


@pytest.fixture
def of_transformers(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> Any:
    """Makes a model that transformers has quantised to 4 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(intermediate_size=128).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return partial(
        AutoModelForCausalLM.from_pretrained,
        tmp_path / "base",
        quantization_config=config,
        device_map=str(tokens.device),
    )


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.filterwarnings("ignore::pissa.notices.RequantizedWarning")
def test_all_layers_are_dense_or_none_is(merged: bool, of_transformers: Any, tokens: Tensor, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    fields = {"target_modules": ["q_proj"]} if merged else {"quant": "nf4", "exclude_modules": ["lm_head"]}
    wrapped = pissa.wrap(of_transformers(), r=R, **fields)
    model = wrapped.merge_and_unload() if merged else wrapped.unload()
    assert not any(map(has_codes, model.modules()))
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_loaded_in_4bit", False)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=str(tokens.device))
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_an_adapter_on_a_dense_layer_leaves_the_codes(of_transformers: Any, tokens: Tensor, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = pissa.wrap(of_transformers(), r=R, target_modules=["lm_head"]).merge_and_unload()
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=str(tokens.device))
    assert error(logits(again, tokens), logits(model, tokens)) < 4 * EPS[torch.bfloat16]


@pytest.mark.filterwarnings("ignore::pissa.notices.RequantizedWarning")
def test_a_mixture_that_no_configuration_describes_is_refused(of_transformers: Any, tmp_path: Path) -> None:
    model = pissa.wrap(of_transformers(), r=R, target_modules=["q_proj"], quant="nf4").unload()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj is in codes"):
            model.save_pretrained(tmp_path / "out")
        model = pissa.wrap(model, r=R, target_modules=["k_proj"]).unload()  # which changes nothing
    assert not [*(tmp_path / "out").glob("*.safetensors")]
