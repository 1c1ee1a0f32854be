"""What may be asked of an adapter, of every kind of layer: it starts at the base, learns, and comes back to the bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import pissa
from devices import current, put
from language_models import error
from one_layer import OneLayer, adapted, assert_comes_back, filled, wrap
from oracle import change_a_little
from reference import EPS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of kernels that it could download
    import bitsandbytes as bnb

IN, OUT, R = 64, 32, 3


def linear4bit() -> Any:
    return filled(bnb.nn.Linear4bit(IN, OUT, quant_type="nf4", quant_storage=torch.bfloat16)).to(current)


def linear8bit() -> Any:
    return filled(bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)).to(current)


def embedding() -> nn.Module:
    return put(filled(nn.Embedding(IN, OUT)))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: put(filled(nn.Linear(IN, OUT))),
    "conv1d": lambda: put(filled(Conv1D(OUT, IN))),
    "embedding": embedding,
    "convolution": lambda: put(filled(nn.Conv2d(IN, OUT, 2))),
    "4 bits": linear4bit,
    "8 bits": linear8bit,
}
LINEAR = ("linear", "conv1d", "4 bits", "8 bits")
VARIANTS: list[dict[str, Any]] = [
    {"use_dora": True},
    {"init": "lora", "use_dora": True},
    {"init": "lora"},
    {"use_rslora": True},
    {"lora_dropout": 0.3},
]


def inputs(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "embedding":
        return put(torch.randint(0, IN, (3, 5), generator=generator))
    return put(torch.randn(*((2, IN, 4, 5) if kind == "convolution" else (3, 5, IN)), generator=generator))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_every_variant_of_every_kind(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    make, x = KINDS[kind], inputs(kind)
    if "use_dora" in fields and kind not in LINEAR:
        with pytest.raises(TypeError, match="use_dora is for linear layers; leave it out of target_modules"):
            wrap(make(), r=R, **fields)
        return
    model = wrap(make(), r=R, lora_alpha=5, **fields).train()
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        assert torch.equal(model(x), base)
        if kind != "4 bits":
            assert torch.equal(base, OneLayer(make()).train()(x))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        learnt = model.eval()(x)
        assert (learnt - 1).square().mean() < (base - 1).square().mean()
        plain = assert_comes_back(model, make, x, tmp_path).train("4 bits" in kind and "lora_dropout" not in fields)
        if kind != "4 bits" or "lora_dropout" not in fields:  # bitsandbytes repacks its weights in evaluation
            assert error(plain(x), model(x)) < IN * EPS[torch.float32]
        expected = model(x)
        model.merge_adapter()
        assert error(model(x), expected) < (2**-7 if kind == "8 bits" else IN * EPS[torch.float32])  # 7 bits and a sign
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)
        model.delete_adapter("default")
        # PEFT's own wrapper is lost without an adapter; bitsandbytes computes 8 bits otherwise in evaluation.
        assert torch.equal(model.base_model.model.train()(x), base)


def test_kinds_that_live_in_one_model_and_adapter(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({name.replace(" ", "_"): kind() for name, kind in KINDS.items()})

    names = [name.replace(" ", "_") for name in KINDS]
    model = pissa.wrap(make(), r=R, target_modules=names)
    for name in names:
        for parameter in model.base_model.model[name].factor_parameters("default"):
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    again = pissa.PissaModel.from_pretrained(make(), tmp_path)
    for name, kind in zip(names, KINDS, strict=True):
        x = inputs(kind)
        assert torch.equal(again.base_model.model[name](x), model.base_model.model[name].eval()(x))
    unloaded = model.unload()
    assert [type(module) for module in unloaded.values()] == [type(module) for module in make().values()]
    assert not isinstance(adapted(wrap(unloaded["4_bits"], r=R)).weight, bnb.nn.Params4bit)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_checkpointing(kind: str) -> None:
    make, x = KINDS[kind], inputs(kind)
    model = wrap(make(), r=R).train()
    with torch.autocast(current.type, torch.bfloat16):
        with torch.no_grad(), model.disable_adapter():
            base = model(x)
        y = model(x)
        assert y.dtype == base.dtype
        assert torch.equal(y, base)
        y.float().square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapted(model).factor_parameters("default")[1:])

    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        y.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in adapted(model).factor_parameters("default")])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_convolution_over_channels_last() -> None:
    model, x = wrap(KINDS["convolution"](), r=R), inputs("convolution")
    change_a_little(adapted(model))
    with torch.no_grad():
        expected, got = model(x), model(x.to(memory_format=torch.channels_last))
    assert error(got, expected) < 4 * IN * EPS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "convolution"])
def test_an_adapter_of_16_bits_computes_and_learns(kind: str, dtype: torch.dtype) -> None:
    """What `model.bfloat16()`, Trainer's bf16_full_eval or FSDP's param_dtype make of an adapter that was float32."""
    model, x = wrap(KINDS[kind](), r=R, autocast_adapter_dtype=False), inputs(kind)
    layer = adapted(model)
    change_a_little(layer)
    for factor in layer.factor_parameters("default"):
        factor.data = factor.data.to(dtype).float()
    expected = model(x).detach()
    model.to(dtype)
    y = model(x if kind == "embedding" else x.to(dtype))
    assert y.dtype == dtype
    # x and the weight are rounded to `dtype`, and the output
    assert error(y, expected) < 4 * EPS[dtype]
    y.float().square().mean().backward()
    for factor in layer.factor_parameters("default"):
        assert factor.dtype == factor.grad.dtype == dtype
        assert factor.grad.abs().max() > 0


@pytest.mark.parametrize("scale", [0.0, -0.75])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_may_be_switched_off_or_taken_away(kind: str, scale: float) -> None:
    model, x = wrap(KINDS[kind](), r=R), inputs(kind)
    layer = adapted(model)
    change_a_little(layer)
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    with torch.no_grad():
        change = model(x) - base
        layer.set_scale("default", scale)
        y = model(x)
    assert y.isfinite().all()
    if scale == 0:
        assert torch.equal(y, base)
    # Two outputs rounded, and their difference.
    assert (y - base - scale * change).abs().max() <= 16 * EPS[y.dtype] * base.abs().max()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "8 bits"])
def test_delta_weight_has_the_shape_of_the_weight(kind: str) -> None:
    """peft.convert_to_lora and whoever merges by hand add it to the weight."""
    model, x = wrap(KINDS[kind](), r=R), inputs(kind)
    layer = adapted(model)
    change_a_little(layer)
    delta = layer.get_delta_weight("default")
    if kind == "4 bits":
        assert delta.shape == (OUT, IN)
        return
    merged = model(x).detach()
    base = copy.deepcopy(layer.base_layer)
    assert delta.shape == base.weight.shape
    base.weight.data += delta
    assert error(base(x), merged) < 64 * EPS[torch.float32]


def test_delta_weight_of_a_stored_conv1d_is_transposed_as_its_weight_was() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = wrap(KINDS["conv1d"](), r=R, quant="nf4")
    layer = adapted(model)
    change_a_little(layer)
    assert torch.equal(layer.get_delta_weight("default"), layer.delta_matrix("default").mT)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"quant": "nf4", "use_dora": True}])
def test_without_autocast_all_that_is_trained_has_the_model_s_dtype(fields: dict[str, Any]) -> None:
    """As in PEFT; and step 0 is the base all the same: a magnitude that bfloat16 rounds starts at the base's length."""
    x = inputs("linear").bfloat16()
    model = wrap(KINDS["linear"]().bfloat16(), r=R, autocast_adapter_dtype=False, **fields)
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)
    second = {name: value for name, value in fields.items() if name != "quant"}
    config = pissa.PissaConfig(r=2, target_modules=["proj"], **second)
    model.add_adapter("second", config, autocast_adapter_dtype=False)
    model.set_adapter("second")
    assert torch.equal(model(x), base)
    trained = {name: p.dtype for name, p in model.named_parameters() if ".lora_" in name}
    assert len(trained) == (6 if "use_dora" in fields else 4)
    assert set(trained.values()) == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_have_pefts_names(kind: str) -> None:
    model = wrap(KINDS[kind](), r=R)
    name = {"embedding": "lora.Embedding", "convolution": "lora.Conv2d"}.get(kind, "lora.Linear")
    assert repr(adapted(model)).startswith(f"{name}(")
    (status,) = peft.get_layer_status(model)
    assert status.module_type == name
