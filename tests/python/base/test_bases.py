"""Bases that are dense but not plainly there: offloaded by accelerate, on the meta device, transposed as Conv1D is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import devices
import pissa
from daily import each
from devices import put
from language_models import FORMS, Make, assert_same, error, logits, snapshot, train
from one_layer import (
    OneLayer,
    adapted,
    filled,
)
from oracle import change_a_little
from pissa import notices, ops
from pissa.base.classes import base_of
from pissa.base.weights import is_offloaded
from pissa.layers import PissaLinear
from pissa.layers.layer import pissa_layers
from reference import EPS

forms = pytest.mark.parametrize("form", FORMS)

# ---- Offloaded -------------------------------------------------------------------------------------------------------

Offload = Callable[[nn.Module, Path], nn.Module]


def to_memory(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model.cpu(), execution_device=devices.current)


def to_disk(model: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model.cpu(), folder, execution_device=devices.current)


def by_map(model: nn.Module, folder: Path) -> nn.Module:
    """One block stays, one is fetched from memory, what follows from the disk."""
    places = {"model.embed_tokens": devices.current, "model.rotary_emb": devices.current, "model.layers.0": "cpu"}
    places |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"}
    if devices.on_cpu():
        places["model.layers.0"] = "disk"  # where there is no GPU, what is on the CPU stays
    return dispatch_model(model.cpu(), places, main_device=devices.current, offload_dir=folder, force_hooks=True)


WAYS: dict[str, Offload] = {"memory": to_memory, "disk": to_disk, "device_map": by_map}
ways = pytest.mark.parametrize("way", each(WAYS, ["device_map"]))


@pytest.fixture
def offloaded(tiny_llama: Make, tmp_path: Path) -> Callable[..., nn.Module]:
    """Makes the fixture's Llama with its weights where the given way puts them."""
    made = []

    def make(way: str, **config: object) -> nn.Module:
        made.append(way)
        return WAYS[way](tiny_llama(**config), tmp_path / f"offloaded{len(made)}")

    return make


def layers_of(model: nn.Module) -> dict[str, PissaLinear]:
    return pissa_layers(model.base_model.model, "default")


@ways
@forms
def test_offloaded_and_not_are_the_same_to_the_bit(
    way: str, form: str, offloaded: Callable[..., nn.Module], tiny_llama: Make, tokens: Tensor
) -> None:
    plain, model = pissa.wrap(tiny_llama(), r=4, **FORMS[form]), pissa.wrap(offloaded(way), r=4, **FORMS[form])
    if form == "implicit":
        assert torch.equal(logits(model, tokens), logits(tiny_llama(), tokens))
        assert any(is_offloaded(layer.base_layer) for layer in layers_of(model).values())
        assert any(layer.base_layer.weight.is_meta for layer in layers_of(model).values())
    for (name, layer), other in zip(layers_of(model).items(), layers_of(plain).values(), strict=True):
        assert torch.equal(layer.start_of("default").a0, other.start_of("default").a0), name
        for parameter in layer.factor_parameters("default"):
            assert parameter.device == devices.current or devices.on_cpu()
            assert parameter.requires_grad
            assert not parameter.is_meta
    assert train(model, tokens) == train(plain, tokens)
    assert torch.equal(logits(model, tokens), logits(plain, tokens))


@ways
@forms
def test_an_offloaded_model_is_saved_restored_merged_and_unloaded(
    way: str, form: str, offloaded: Callable[..., nn.Module], tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    base = offloaded(way)
    before = logits(base, tokens)
    model = pissa.wrap(base, r=4, **FORMS[form])
    stored = logits(model, tokens)
    train(model, tokens)
    trained = logits(model, tokens)
    if form == "nf4":
        with pytest.warns(notices.InexactLoraWarning, match="stored as nf4"):
            model.save_pretrained(tmp_path / "saved")
    else:
        model.save_pretrained(tmp_path / "saved")
    for fresh in (offloaded(way), tiny_llama()):
        assert torch.equal(logits(pissa.PissaModel.from_pretrained(fresh, tmp_path / "saved"), tokens), trained)

    model.merge_adapter()
    # A weight is rounded once more, and products are summed in another order, through two blocks.
    assert error(logits(model, tokens), trained) < 100 * EPS[torch.float32]
    if form == "implicit":
        assert any(layer.base_layer.weight.is_meta for layer in layers_of(model).values())  # offloaded as the base was
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), trained)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), stored)
    unloaded = model.unload()
    if form == "implicit":
        assert torch.equal(logits(unloaded, tokens), before)
        assert unloaded is base
    again = pissa.wrap(unloaded, r=4)
    merged = again.merge_and_unload()
    assert error(logits(merged, tokens), stored) < 100 * EPS[torch.float32]


def test_a_model_that_transformers_has_offloaded(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """Merged weights are offloaded too, and transformers saves them all the same."""
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")
    here = ("model.embed_tokens", "model.rotary_emb", "model.layers.1", "model.norm", "lm_head")
    places = {"model.layers.0": "disk", **dict.fromkeys(here, str(devices.current))}

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", device_map=places, offload_folder=tmp_path / "offloaded"
        )

    model = pissa.wrap(load(), r=4)
    assert layers_of(model)["model.layers.0.mlp.up_proj"].base_layer.weight.is_meta
    assert torch.equal(logits(model, tokens), logits(tiny_llama(), tokens))
    train(model, tokens)
    trained = logits(model.eval(), tokens)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(pissa.PissaModel.from_pretrained(load(), tmp_path / "adapter"), tokens), trained)
    merged = model.merge_and_unload()
    assert error(logits(merged, tokens), trained) < 100 * EPS[torch.float32]
    with pytest.warns(UserWarning, match="Attempting to save a model with offloaded modules"):
        merged.save_pretrained(tmp_path / "merged")
    loaded = put(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")).eval()
    assert torch.equal(logits(loaded, tokens), logits(merged, tokens))


def test_an_offloaded_layer_is_fetched_alone(
    offloaded: Callable[..., nn.Module], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is offloaded because it does not fit: no more than a group of its layers is in memory at once."""
    monkeypatch.setattr("pissa.model.decompose._GROUP", 1)
    if not devices.on_cpu():
        monkeypatch.setattr("pissa.model.decompose._GPU_GROUP", 1)
    split_many, sizes = ops.split_many, []

    def watched(weights: list[Tensor], *args: object, **kwargs: object) -> object:
        sizes.append((len(weights), sum(not module.weight.is_meta for module in linears)))
        return split_many(weights, *args, **kwargs)

    monkeypatch.setattr(ops, "split_many", watched)
    base = offloaded("memory")
    linears = [module for module in base.modules() if type(module) is nn.Linear]
    model = pissa.wrap(base, r=4)
    assert sizes == [(1, 0)] * 14
    for call in (model.merge_adapter, model.unmerge_adapter, model.unload):
        call()
        assert all(module.weight.is_meta for module in linears)


def test_a_failure_leaves_an_offloaded_model_as_it_was(offloaded: Callable[..., nn.Module], tokens: Tensor) -> None:
    base = offloaded("memory")
    output, before = logits(base, tokens), snapshot(base)
    base.model.layers[1].mlp.down_proj._hf_hook.weights_map["weight"][3, 5] = math.nan
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp\.down_proj: weight: contains NaN"):
        pissa.wrap(base, r=4, quant="nf4")
    assert_same(base, before)
    base.model.layers[1].mlp.down_proj._hf_hook.weights_map["weight"][3, 5] = 0
    assert error(logits(base, tokens), output) < 0.1


@ways
def test_a_second_adapter_and_embeddings_of_an_offloaded_model(
    way: str, offloaded: Callable[..., nn.Module], tokens: Tensor
) -> None:
    model = pissa.wrap(offloaded(way), r=4, target_modules=["embed_tokens", "q_proj"])
    model.add_adapter("second", pissa.PissaConfig(r=2, target_modules=["v_proj"], use_dora=True))
    before = logits(model, tokens)
    model.set_adapter("second")
    assert torch.equal(logits(model, tokens), before)
    losses = train(model, tokens)
    assert losses[-1] < losses[0]
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens), before)
    losses = train(model, tokens)
    assert losses[-1] < losses[0]


def test_dora_on_an_offloaded_layer_with_a_bias() -> None:
    def make() -> OneLayer:
        return OneLayer(filled(nn.Linear(12, 8)))

    x = put(torch.randn(5, 12, generator=torch.Generator().manual_seed(7)))
    outputs = []
    for base in (put(make()), cpu_offload(make(), execution_device=devices.current)):
        expected = base(x)
        model = pissa.wrap(base, r=2, target_modules=["proj"], use_dora=True)
        assert torch.equal(model(x), expected)
        change_a_little(adapted(model))
        adapted(model).magnitude("default").weight.data *= 1.5
        outputs.append(model(x))
    assert torch.equal(*outputs)


def test_no_adapter_is_loaded_into_a_model_on_the_meta_device(tiny_llama: Make, tmp_path: Path) -> None:
    pissa.wrap(tiny_llama(), r=4).save_pretrained(tmp_path)
    empty = tiny_llama().to("meta")
    before = snapshot(empty)
    with pytest.raises(ValueError, match=r"q_proj is on the meta device and holds no values: load or materialise it"):
        pissa.PissaModel.from_pretrained(empty, tmp_path)
    assert_same(empty, before)


def test_where_a_module_computes() -> None:
    layer = nn.Linear(3, 2)
    assert base_of(layer).device == torch.device("cpu")
    cpu_offload(OneLayer(layer), execution_device=torch.device("cpu"))
    assert layer.weight.is_meta
    assert base_of(layer).device == torch.device("cpu")
    assert not base_of(layer).matrix().is_meta
    twin = base_of(layer).dense_module(torch.ones(2, 3))
    assert is_offloaded(twin)
    assert torch.equal(twin(torch.ones(3)), 3 + layer._hf_hook.weights_map["bias"])
    assert layer.weight.is_meta


# ---- Conv1D; layers/test_kinds.py and model/test_architectures.py have the rest of its life --------------------------


def test_conv1d_beside_linear_layers_in_plain_peft(tmp_path: Path) -> None:
    """fan_in_fan_out is of the whole configuration there, and PEFT corrects it for a layer that is not transposed."""

    def make() -> nn.Module:
        return put(nn.ModuleDict({"first": filled(Conv1D(24, 40)), "second": filled(nn.Linear(40, 24), seed=1)}))

    model = pissa.wrap(make(), r=3, target_modules=["first", "second"])
    for layer in layers_of(model).values():
        change_a_little(layer)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True but the target module is `torch.nn.Linear`"):
        plain = peft.PeftModel.from_pretrained(make(), tmp_path)
    for name in ("first", "second"):
        x = put(torch.randn(3, 40, generator=torch.Generator().manual_seed(7)))
        got, expected = plain.base_model.model[name](x), model.base_model.model[name](x)
        assert error(got, expected) < 40 * EPS[torch.float32]
