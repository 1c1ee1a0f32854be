"""Adapters of every PiSSA layout as a plain LoRA: the same function in plain PEFT, of a lower rank what is best."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import devices
import pissa
from architectures import ARCHITECTURES
from language_models import FORMS, Make, error, logits, train
from peft_adapters import plain_logits, save_subtracted, train_on_residual, train_pissa
from pissa import conversion
from pissa.lora_folder import LoraFolder

# float32, two layers: the products are summed in another order
CLOSE = 1e-5

NAMES = ["adapter_config.json", "adapter_model.safetensors"]
PATTERNS = {
    "lora_alpha": 6,
    "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5},
    "alpha_pattern": {"v_proj": 3, "layers.1.mlp.up_proj": 8},
}
FIELDS: dict[str, dict[str, object]] = {
    "plain": {},
    "rslora, patterns": {"use_rslora": True, **PATTERNS},
    "dora": {"use_dora": True, "lora_alpha": 6},
    "more tensors": {"bias": "lora_only", "modules_to_save": ["norm"]},
}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text())


def changes(folder: Path) -> dict[str, Tensor]:
    """The change s B A of each weight in a LoRA folder, in float64; of experts the one after the other."""
    lora = LoraFolder.read(folder)
    return {
        name: factors.scaling * torch.stack([b @ a for a, b in lora.matrices(name)])
        for name, factors in lora.factors.items()
    }


# ---- Our own adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [*FIELDS.values(), {"use_adalora": True}], ids=[*FIELDS, "adalora"])
def test_our_folder_becomes_a_plain_lora(
    fields: dict[str, object], tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    model = pissa.wrap(tiny_llama(), r=4, **fields)
    train(model, tokens)
    model.save_pretrained(tmp_path / "ours")
    done = pissa.convert(tmp_path / "ours", tmp_path / "lora")
    assert files(tmp_path / "lora") == NAMES
    assert done.kept == 1
    assert done.worst == 0
    ours, lora = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "lora"))
    assert ours.keys() == lora.keys()
    assert all(torch.equal(tensor, lora[name]) for name, tensor in ours.items())
    model.eval()
    assert error(plain_logits(tiny_llama(), tmp_path / "lora", tokens), logits(model, tokens)) < CLOSE


@pytest.mark.parametrize("form", ["explicit", "nf4"])
def test_a_stored_residual_is_mentioned(form: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(), r=4, **FORMS[form])
    train(model, tokens)
    model.warned_of_plain_lora = True
    model.save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match=f"stored as {form}: on the unmodified base the LoRA lacks"):
        pissa.convert(tmp_path / "ours", tmp_path / "lora")
    model.eval()
    with model.disable_adapter():
        lacking = error(logits(model, tokens), logits(tiny_llama(), tokens))
    found = error(plain_logits(tiny_llama(), tmp_path / "lora", tokens), logits(model, tokens))
    assert found <= max(2 * lacking, CLOSE)


ARCHITECTURE = [
    "mixtral",
    "deepseek_v2",
    "gpt2",
    "llama, embeddings targeted",
    "roberta",
    "vit, patches targeted",
]


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_experts_embeddings_convolutions_and_conv1d(name: str, tmp_path: Path) -> None:
    """Unchanged, and of a lower rank: the best approximation of each matrix."""
    architecture = ARCHITECTURES[name]
    model = pissa.wrap(architecture.make(), **architecture.config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    batch = architecture.batch()
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    pissa.convert(tmp_path / "ours", tmp_path / "lora")
    pissa.convert(tmp_path / "ours", tmp_path / "all", energy=1.0)
    for folder in ("lora", "all"):
        plain = peft.PeftModel.from_pretrained(architecture.make(), tmp_path / folder).eval()
        with torch.no_grad():
            assert error(plain(**batch).logits, expected) < CLOSE

    low = pissa.convert(tmp_path / "ours", tmp_path / "low", rank=3)
    peft.PeftModel.from_pretrained(architecture.make(), tmp_path / "low")
    check_best(tmp_path / "ours", tmp_path / "low", low, 3)


def check_best(source: Path, target: Path, done: conversion.Conversion, rank: int) -> None:
    """What was left out is the energy of the singular values behind the rank, which dense decompositions find."""
    before, after = changes(source), changes(target)
    assert before.keys() == after.keys() == done.layers.keys()
    energies, lost = 0.0, 0.0
    for name, layer in done.layers.items():
        values = torch.linalg.svdvals(before[name])
        energy, rest = values.square().sum().item(), values[..., rank:].square().sum().item()
        # Squares of float64 sums of values that are smaller than ‖D‖; the factors were rounded to float32.
        assert layer.energy == pytest.approx(energy, rel=1e-10)
        assert layer.lost == pytest.approx(rest, rel=1e-10, abs=1e-12 * energy)
        assert (before[name] - after[name]).norm().item() == pytest.approx(rest**0.5, rel=1e-6, abs=1e-6 * energy**0.5)
        assert layer.kept == pytest.approx(1 - rest / energy)
        assert layer.rank <= rank
        energies, lost = energies + energy, lost + rest
    assert done.kept == pytest.approx(1 - lost / energies)


# ---- PEFT's PiSSA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("known", ["initial", "base"])
def test_pefts_pissa_on_the_unmodified_base(
    known: str, fields: dict[str, object], tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    trained = train_pissa(tiny_llama(), tokens, tmp_path, **fields)
    options = {"initial": trained.initial} if known == "initial" else {"base": tiny_llama()}
    done = pissa.convert(trained.adapter, tmp_path / "lora", **options)
    assert files(tmp_path / "lora") == NAMES
    assert all(layer.rank == 2 * layer.rank_before for layer in done.layers.values())
    assert 0 < done.worst <= 1
    assert config_of(tmp_path / "lora")["init_lora_weights"] is True
    # PEFT's residual is rounded to float32
    assert error(plain_logits(tiny_llama(), tmp_path / "lora", tokens), trained.logits) < CLOSE


def test_the_start_from_the_base_is_pefts_to_the_bit(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    trained = train_pissa(tiny_llama(), tokens, tmp_path)
    pissa.convert(trained.adapter, tmp_path / "a", initial=trained.initial)
    pissa.convert(trained.adapter, tmp_path / "b", base=tiny_llama())
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_in_bfloat16_only_the_residual_s_rounding_is_lost(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """PEFT rounds A0 and B0 to the base's dtype as well, after it has subtracted them. With those that the residual was
    made with, which the base gives, W + dW is the trained weight but for the rounding of the residual."""
    base = tiny_llama(dtype=torch.bfloat16)
    trained = train_pissa(base, tokens, tmp_path)
    pissa.convert(trained.adapter, tmp_path / "lora", base=tiny_llama(dtype=torch.bfloat16))
    found, adapter, unmodified = changes(tmp_path / "lora"), changes(trained.adapter), tiny_llama(dtype=torch.bfloat16)
    for name, change in found.items():
        residual, weight = (
            devices.fetch(
                model.get_submodule(name).get_parameter("base_layer.weight" if model is base else "weight")
            ).double()
            for model in (base, unmodified)
        )
        rounding = 2.0**-8 * residual.abs()
        single = 16 * 2.0**-24 * (weight.abs().max() + adapter[name].abs().max())  # products of 4 terms in float32
        assert ((weight + change[0] - residual - adapter[name][0]).abs() <= rounding + single).all(), name


def test_singular_vectors_of_another_sign(
    tiny_llama: Make, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine a pair of vectors may come out with the other sign: the differences stay small."""
    trained = train_pissa(tiny_llama(), tokens, tmp_path)
    decompose = torch.linalg.svd

    def flipped(matrix: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = decompose(matrix, **options)
        if matrix.dtype == torch.float64:  # the change's own
            return u, s, vh
        signs = torch.ones_like(s)
        signs[::2] = -1
        return u * signs, s, signs[:, None] * vh

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    pissa.convert(trained.adapter, tmp_path / "lora", base=tiny_llama())
    monkeypatch.undo()
    pissa.convert(trained.adapter, tmp_path / "same", base=tiny_llama())
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "same"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_random_decomposition_cannot_be_repeated(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    trained = train_pissa(tiny_llama(), tokens, tmp_path, init="pissa_niter_4")
    for options in ({}, {"base": tiny_llama()}):
        with pytest.raises(
            ValueError, match=r"'pissa_niter_4', a random decomposition that PEFT does not seed.*initial="
        ):
            pissa.convert(trained.adapter, tmp_path / "lora", **options)
    assert not (tmp_path / "lora").exists()
    pissa.convert(trained.adapter, tmp_path / "lora", initial=trained.initial)
    assert error(plain_logits(tiny_llama(), tmp_path / "lora", tokens), trained.logits) < CLOSE


def test_another_start_that_changes_the_base(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """With the initial adapter it does not matter how the start was found."""
    trained = train_pissa(tiny_llama(), tokens, tmp_path, init="olora")
    with pytest.raises(ValueError, match="init_lora_weights is 'olora', which changes the base"):
        pissa.convert(trained.adapter, tmp_path / "lora", base=tiny_llama())
    pissa.convert(trained.adapter, tmp_path / "lora", initial=trained.initial)
    assert error(plain_logits(tiny_llama(), tmp_path / "lora", tokens), trained.logits) < CLOSE


def test_embeddings_which_peft_starts_as_lora_and_gpt2(tmp_path: Path) -> None:
    """PEFT's "pissa" leaves an embedding's weight alone; its change keeps rank r. Conv1D's weights lie transposed."""
    architecture = ARCHITECTURES["gpt2"]
    tokens = architecture.batch()["input_ids"]
    fields = {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}
    base = architecture.make()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.clone())
    trained = train_pissa(base, tokens, tmp_path, **fields)
    for name, options in {"a": {"initial": trained.initial}, "b": {"base": architecture.make()}}.items():
        done = pissa.convert(trained.adapter, tmp_path / name, **options)
        assert done.layers["transformer.wte"].rank == 4
        assert done.layers["transformer.h.0.attn.c_attn"].rank == 8
        base = architecture.make()
        base.lm_head.weight = nn.Parameter(base.lm_head.weight.clone())
        assert error(plain_logits(base, tmp_path / name, tokens), trained.logits) < CLOSE


def test_an_output_layer_s_own_weight_becomes_the_base_s(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """PEFT saves the output layer's weight beside its adapter, which is W - s B0 A0 with PiSSA."""
    trained = train_pissa(tiny_llama(), tokens, tmp_path, target_modules=["lm_head", "q_proj"])
    name = "base_model.model.lm_head.base_layer.weight"
    assert name in load_file(trained.adapter / "adapter_model.safetensors")
    pissa.convert(trained.adapter, tmp_path / "lora", base=tiny_llama())
    weight = load_file(tmp_path / "lora" / "adapter_model.safetensors")[name]
    # One rounding of W - s B0 A0, a product of 4 terms in float32, and one of the sum
    assert torch.allclose(weight, devices.fetch(tiny_llama().lm_head.weight), rtol=0, atol=8 * 2**-24)
    assert error(plain_logits(tiny_llama(), tmp_path / "lora", tokens), trained.logits) < CLOSE


def test_a_base_that_the_adapter_was_not_trained_on_is_refused(
    tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    trained = train_pissa(tiny_llama(), tokens, tmp_path)
    tied = tiny_llama(tie_word_embeddings=True)
    bases = {
        "it is not the base that the adapter was trained on": tiny_llama(seed=1),
        r"the base has no layer model\.layers\.1": tiny_llama(num_hidden_layers=1),
        r"down_proj is torch.float32 \[64, 48\] in the base; needed: a float weight": tiny_llama(intermediate_size=48),
        "base is a PeftModel, in which PiSSA has replaced weights": peft.get_peft_model(
            tiny_llama(), peft.LoraConfig(target_modules=["q_proj"])
        ),
        "cannot be loaded as a model": tmp_path / "nowhere",
    }
    for message, base in bases.items():
        with pytest.raises(ValueError, match=message):
            pissa.convert(trained.adapter, tmp_path / "lora", base=base)
    shared = train_pissa(tiny_llama(), tokens, tmp_path / "tied", target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"layer lm_head shares its weight with model\.embed_tokens\.weight"):
        pissa.convert(shared.adapter, tmp_path / "lora", base=tied)
    with pytest.raises(ValueError, match=r"init_lora_weights is 'pissa'; .* Give the base W, base="):
        pissa.convert(trained.adapter, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_an_initial_adapter_of_another_run_is_refused(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    trained = train_pissa(tiny_llama(), tokens, tmp_path)
    others = {
        "has factors .* and scaling": {"r": 3},
        "and scaling 1 there": {"lora_alpha": 4},
        "only the trained adapter has layer": {"target_modules": ["q_proj"]},
    }
    for message, fields in others.items():
        other = train_pissa(tiny_llama(), tokens, tmp_path / str(len(message)), **fields)
        with pytest.raises(ValueError, match=message):
            pissa.convert(trained.adapter, tmp_path / "lora", initial=other.initial)
    assert not (tmp_path / "lora").exists()


# ---- The authors' layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_a_residual_model(dtype: torch.dtype, tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    trained = train_on_residual(tiny_llama, tokens, tmp_path, dtype)
    done = pissa.convert(trained.adapter, tmp_path / "lora", initial=trained.initial, base=tmp_path / "base")
    assert done.layout == "an adapter on a residual, and its initial adapter"
    pissa.convert(trained.adapter, tmp_path / "again", initial=trained.initial / "pissa_init")
    again, lora = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "lora"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in lora.items())
    plain = plain_logits(tiny_llama(dtype=dtype), tmp_path / "lora", tokens)
    # bfloat16: 8 bits, of the residual and of every activation
    assert error(plain, trained.logits) < (CLOSE if dtype == torch.float32 else 16 * 2**-8)


def test_the_residual_model_that_an_adapter_names_is_looked_into(
    tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    trained = train_on_residual(tiny_llama, tokens, tmp_path)
    config = config_of(trained.adapter) | {"base_model_name_or_path": str(trained.initial)}
    (trained.adapter / "adapter_config.json").write_text(json.dumps(config))
    pissa.convert(trained.adapter, tmp_path / "lora")
    assert error(plain_logits(tiny_llama(), tmp_path / "lora", tokens), trained.logits) < CLOSE
    assert config_of(tmp_path / "lora")["base_model_name_or_path"] is None  # not the residual model
    tiny_llama().save_pretrained(tmp_path / "base")
    pissa.convert(trained.adapter, tmp_path / "named", base=tmp_path / "base")
    assert config_of(tmp_path / "named")["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_residual_of_another_base_is_refused(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    trained = train_on_residual(tiny_llama, tokens, tmp_path)
    base = tiny_llama()
    weight = base.model.layers[1].self_attn.v_proj.weight
    weight.data[3, 5] += 1e-5
    with pytest.raises(
        ValueError, match=r"do not add up to the base: in layer model\.layers\.1\.self_attn\.v_proj they"
    ):
        pissa.convert(trained.adapter, tmp_path / "lora", initial=trained.initial, base=base)
    shutil.copytree(trained.initial / "pissa_init", tmp_path / "alone")
    with pytest.raises(ValueError, match=r"base is only compared with a residual model, and .* lies in none"):
        pissa.convert(trained.adapter, tmp_path / "lora", initial=tmp_path / "alone", base=base)
    assert not (tmp_path / "lora").exists()


# ---- [B, -B0]·[A ; A0] -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_what_peft_subtracts_is_recognised(init: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """And written so that bfloat16 holds it."""
    expected = save_subtracted(tiny_llama(), tokens, tmp_path / "peft", init=init)
    done = pissa.convert(tmp_path / "peft", tmp_path / "lora")
    assert done.layout == "[B, -B0]·[A ; A0]"
    assert error(plain_logits(tiny_llama(), tmp_path / "lora", tokens), expected) < CLOSE
    errors = {}
    exact = changes(tmp_path / "lora")
    for name in ("peft", "lora"):
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        (tmp_path / "rounded").mkdir(exist_ok=True)
        shutil.copy(tmp_path / name / "adapter_config.json", tmp_path / "rounded")
        save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, tmp_path / "rounded" / NAMES[1])
        errors[name] = [error(change, exact[key]) for key, change in changes(tmp_path / "rounded").items()]
    # Each element of the factors has one error of 2^-9, and few terms cancel.
    assert max(errors["lora"]) < 4 * 2**-9
    assert min(errors["peft"]) > 4 * max(errors["lora"])


def test_what_is_not_recognised_may_be_said(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    expected = save_subtracted(tiny_llama(), tokens, tmp_path / "peft", init="olora")
    with pytest.raises(ValueError, match=r"is a plain LoRA already\. Give rank= or energy=.*subtracted=True"):
        pissa.convert(tmp_path / "peft", tmp_path / "lora")
    pissa.convert(tmp_path / "peft", tmp_path / "lora", subtracted=True)
    assert error(plain_logits(tiny_llama(), tmp_path / "lora", tokens), expected) < CLOSE
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    a = tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    assert a[4:].norm() < 0.5 * a[:4].norm()
    low = pissa.convert(tmp_path / "peft", tmp_path / "plain", rank=2, subtracted=False)
    assert low.layout == "a plain LoRA"
    check_best(tmp_path / "peft", tmp_path / "plain", low, 2)


# ---- Lower ranks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ours(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> Path:
    """A trained adapter of ours."""
    model = pissa.wrap(tiny_llama(), r=4, **PATTERNS)
    train(model, tokens)
    model.save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


def test_a_lower_rank_is_the_best_of_that_rank(ours: Path, tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    for rank in (1, 3, 8, 50):
        done = pissa.convert(ours, tmp_path / str(rank), rank=rank)
        check_best(ours, tmp_path / str(rank), done, rank)
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / str(rank))
    assert {layer.rank for layer in done.layers.values()} == {6, 8, 10}  # nothing to lower


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_the_smallest_rank_that_keeps_the_energy(energy: float, ours: Path, tmp_path: Path) -> None:
    done = pissa.convert(ours, tmp_path / "lora", energy=energy)
    before = changes(ours)
    for name, layer in done.layers.items():
        squares = torch.linalg.svdvals(before[name][0]).square()
        shares = squares.cumsum(0) / squares.sum()
        assert layer.kept >= energy
        assert layer.rank == int((shares < energy).sum()) + 1
    assert done.kept >= energy


def test_an_adapter_that_learnt_nothing(tiny_llama: Make, tmp_path: Path) -> None:
    pissa.wrap(tiny_llama(), r=4).save_pretrained(tmp_path / "ours")
    done = pissa.convert(tmp_path / "ours", tmp_path / "lora", energy=0.9)
    assert {(layer.rank, layer.energy, layer.kept) for layer in done.layers.values()} == {(1, 0.0, 1.0)}
    assert done.kept == 1


def test_runtimes_that_know_no_patterns_scale_right(tiny_llama: Make, tmp_path: Path) -> None:
    """Where all scalings are equal alpha / r is that of every layer, whatever its rank."""
    model = pissa.wrap(tiny_llama(), r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not ("q_proj.lora_A" in name or "layers.0" in name):
            nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "one")
    done = pissa.convert(tmp_path / "one", tmp_path / "lora", energy=1.0)
    assert sorted(layer.rank for layer in done.layers.values()) == [1, 1, 4, 8]
    config = config_of(tmp_path / "lora")
    assert config["lora_alpha"] / config["r"] == 1.5
    lora = LoraFolder.read(tmp_path / "lora")
    assert {factors.scaling for factors in lora.factors.values()} == {1.5}
    for name, factors in lora.factors.items():
        key = get_pattern_key(list(config["rank_pattern"]), name)
        assert config["rank_pattern"].get(key, config["r"]) == factors.rank == lora.weights.shape(factors.keys[0])[0]


def test_a_pattern_belongs_to_one_layer(tmp_path: Path) -> None:
    """PEFT's patterns match the end of a name: that of layer "proj" would match "inner.proj" as well."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(16, 16, bias=False)
            self.inner = nn.ModuleDict({"proj": nn.Linear(16, 16, bias=False)})

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x) + self.inner["proj"](x)

    torch.manual_seed(0)
    base = Model()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=6, target_modules=["proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
                if "inner" in name and "lora_A" in name:
                    parameter[2:] *= 1e-3
    model.save_pretrained(tmp_path / "source")
    done = pissa.convert(tmp_path / "source", tmp_path / "lora", energy=0.99)
    assert done.layers["inner.proj"].rank == 2 < done.layers["proj"].rank
    fresh = Model()
    fresh.load_state_dict(state)
    plain = peft.PeftModel.from_pretrained(fresh, tmp_path / "lora")
    x = torch.randn(5, 16)
    assert error(plain(x).detach(), model(x).detach()) < 0.15  # the root of the energy that is left out, 0.1, and W


def test_dora_keeps_its_magnitudes_and_says_so(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(), r=4, use_dora=True)
    train(model, tokens)
    model.save_pretrained(tmp_path / "ours")
    with pytest.warns(
        UserWarning, match="DoRA's magnitudes, which were trained with the change that is now approximated"
    ):
        pissa.convert(tmp_path / "ours", tmp_path / "lora", energy=0.99)
    ours, lora = (load_file(tmp_path / name / NAMES[1]) for name in ("ours", "lora"))
    kept = [name for name in ours if name.endswith("lora_magnitude_vector")]
    assert len(kept) == 14
    assert all(torch.equal(ours[name], lora[name]) for name in kept)
    model.eval()
    found, expected = plain_logits(tiny_llama(), tmp_path / "lora", tokens), logits(model, tokens)
    moved = error(logits(tiny_llama(), tokens), expected)
    assert error(found, expected) < moved / 3


# ---- What is refused -------------------------------------------------------------------------------------------------


def spoil_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / NAMES[1])
        change(tensors)
        save_file(tensors, folder / NAMES[1])

    return spoil


def spoil_config(**fields: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / NAMES[0]).write_text(json.dumps(config_of(folder) | fields))

    return spoil


Q = "base_model.model.model.layers.0.self_attn.q_proj"
SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, r"adapter is missing; needed: an adapter's folder"),
    "no config": (lambda folder: (folder / NAMES[0]).unlink(), "holds no adapter: there is no adapter_config.json"),
    "no tensors": (lambda folder: (folder / NAMES[1]).unlink(), "adapter_model.safetensors is missing"),
    "a pickle": (
        lambda folder: (folder / NAMES[1]).rename(folder / "adapter_model.bin"),
        "adapter_model.bin, beside it, is a pickle, which is never read",
    ),
    "cut": (
        lambda folder: (folder / NAMES[1]).write_bytes((folder / NAMES[1]).read_bytes()[:-1]),
        "adapter_model.safetensors cannot be read: .*damaged",
    ),
    "no json": (lambda folder: (folder / NAMES[0]).write_text("{"), "adapter_config.json cannot be used: Expecting"),
    "a list": (lambda folder: (folder / NAMES[0]).write_text("[]"), r"it holds \[\]; needed: an object"),
    "twice": (lambda folder: (folder / NAMES[0]).write_text('{"r": 1, "r": 2}'), "'r' is there twice"),
    "nested": (lambda folder: (folder / NAMES[0]).write_text("[" * 100_000), "adapter_config.json cannot be used"),
    "NaN in config": (spoil_config(lora_dropout=math.nan), "it holds NaN, which is not JSON"),
    "another method": (spoil_config(peft_type="LOHA"), "peft_type is 'LOHA'; needed: 'LORA'"),
    "a variant": (spoil_config(alora_invocation_tokens=[1]), r"alora_invocation_tokens is \[1\], a variant of LoRA"),
    "a later variant": (spoil_config(use_something=True), "use_something is True, a variant of LoRA"),
    "rank": (spoil_config(r=0), "r is 0; needed: a whole number from 1 on"),
    "alpha": (spoil_config(lora_alpha="8"), "lora_alpha is '8'; needed: a number of at most"),
    "huge alpha": (spoil_config(lora_alpha=10**400), "lora_alpha is 1000.*; needed: a number of at most"),
    "pattern": (spoil_config(rank_pattern={"(": 1}), "rank_pattern is .*; needed: an object of regular expressions"),
    "a flag inside": (spoil_config(alpha_pattern={"(?i)q": 1}), "alpha_pattern is .*; needed: an object of regular"),
    "flag": (spoil_config(use_rslora="yes"), "use_rslora is 'yes'; needed: true or false"),
    "another start": (spoil_config(init_lora_weights="corda"), "'corda', which changes the base. Give the adapter as"),
    "experts": (
        spoil_config(target_parameters=["self_attn.q_proj.kernel"]),
        "are those of a parameter, but of target_parameters",
    ),
    "another rank": (
        spoil_config(rank_pattern={"q_proj": 5}),
        rf"{Q}.lora_A.weight' \[4, 64\] and .* are no factors of rank 5, which adapter_config.json gives them",
    ),
    "no partner": (
        spoil_tensors(lambda tensors: tensors.pop(f"{Q}.lora_B.weight")),
        rf"tensor '{Q}.lora_A.weight' has no other factor beside it",
    ),
    "nothing": (spoil_tensors(dict.clear), "holds no factors"),
    "a scalar": (
        spoil_tensors(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.tensor(1.0)})),
        rf"{Q}.lora_A.weight' \[\] and .* are no factors of rank 4",
    ),
    "a vector": (
        spoil_tensors(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4)})),
        rf"{Q}.lora_A.weight' \[4\] and .* are no factors of rank 4",
    ),
    "a kernel": (
        spoil_tensors(
            lambda tensors: tensors.update(
                {f"{Q}.lora_A.weight": torch.ones(4, 2, 3), f"{Q}.lora_B.weight": torch.ones(5, 4, 3)}
            )
        ),
        rf"{Q}.lora_B.weight' \[5, 4, 3\] are no factors of rank 4",
    ),
    "integers": (
        spoil_tensors(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4, 64, dtype=torch.int32)})),
        rf"tensor '{Q}.lora_A.weight' is torch.int32",
    ),
    "NaN": (
        spoil_tensors(lambda tensors: tensors[f"{Q}.lora_B.weight"].fill_(math.nan)),
        rf"tensor '{Q}.lora_B.weight' holds NaN or Inf",
    ),
    "unknown": (
        spoil_tensors(lambda tensors: tensors.update({f"{Q}.lora_C.weight": torch.ones(4)})),
        rf"tensor '{Q}.lora_C.weight' is no part of a LoRA that is known here",
    ),
    "no prefix": (
        spoil_tensors(lambda tensors: tensors.update({"q_proj.lora_A.weight": torch.ones(4, 64)})),
        "tensor 'q_proj.lora_A.weight' is no part of a LoRA that is known here",
    ),
    "a magnitude alone": (
        spoil_tensors(lambda tensors: tensors.update({f"{Q}x.lora_magnitude_vector": torch.ones(4)})),
        rf"tensor '{Q}x.lora_magnitude_vector' belongs to no layer that has factors",
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA of PEFT's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 31, "hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))
    folder = tmp_path_factory.mktemp("plain")
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(folder)
    return folder


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3),
    st.integers(0, 40),
)
def test_damaged_files_give_a_message_or_a_lora(
    plain: Path, name: str, changes: list[tuple[float, int]], cut: int
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "adapter"), Path(scratch, "lora")
        shutil.copytree(plain, source)
        content = bytearray((source / name).read_bytes())
        header = 8 + int.from_bytes(content[:8], "little") if name == NAMES[1] else len(content)
        for place, byte in changes:
            content[int(place * header)] = byte
        (source / name).write_bytes(content[: len(content) - cut if cut < 3 else None])
        try:
            pissa.convert(source, target, rank=2)
        except ValueError as message:
            written = [str(scratch) in str(message), not target.exists()]
        else:
            written = [target.exists()]
        assert all(written)


@pytest.mark.parametrize("name", SPOILT)
def test_malformed_files_are_refused_by_name(name: str, plain: Path, tmp_path: Path) -> None:
    spoil, message = SPOILT[name]
    shutil.copytree(plain, tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as raised:
        pissa.convert(tmp_path / "adapter", tmp_path / "lora", rank=2)
    assert str(tmp_path / "adapter") in str(raised.value)
    assert not (tmp_path / "lora").exists()


def test_files_of_two_saves_are_refused(ours: Path, tmp_path: Path) -> None:
    config, tensors = config_of(ours), load_file(ours / NAMES[1])
    (ours / NAMES[0]).write_text(json.dumps(config | {"lora_alpha": 7}))
    with pytest.raises(
        ValueError, match=r"has rank 8 and scaling .*; in pissa\.json it has 8 and .* do not belong together"
    ):
        pissa.convert(ours, tmp_path / "lora")
    (ours / NAMES[0]).write_text(json.dumps(config))
    save_file(tensors | {"base_model.model.more.lora_A.weight": torch.ones(8, 2)}, ours / NAMES[1])
    with pytest.raises(ValueError, match=r"tensor 'base_model\.model\.more\.lora_A\.weight' has no other factor"):
        pissa.convert(ours, tmp_path / "lora")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] += 1
    save_file(tensors, ours / NAMES[1])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has no checksums|is damaged"):
        pissa.convert(ours, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_arguments_that_make_no_sense(ours: Path, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for source, target, message, fields in [
        (ours, ours, "is not empty .*nothing is overwritten", {}),
        (ours, tmp_path / "file", "is a file; needed: a new folder", {}),
        (ours, tmp_path / "lora", "needed: one of them, or none", {"rank": 2, "energy": 0.5}),
        (ours, tmp_path / "lora", "rank must be a whole number from 1 on, got 0", {"rank": 0}),
        (ours, tmp_path / "lora", "energy must be a number above 0 and at most 1, got 1.5", {"energy": 1.5}),
        (ours, tmp_path / "lora", "is an adapter of pissa; initial is of no use with it", {"initial": ours}),
        (plain, tmp_path / "lora", "is a plain LoRA already", {}),
        (plain, tmp_path / "lora", "initial= has to say so; base is of no use with it", {"rank": 1, "base": "x"}),
    ]:
        with pytest.raises(ValueError, match=message):
            pissa.convert(source, target, **fields)
    assert not (tmp_path / "lora").exists()


# ---- The check at the end --------------------------------------------------------------------------------------------


def test_a_wrong_file_is_not_left_behind(
    tiny_llama: Make, tokens: Tensor, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train_pissa(tiny_llama(), tokens, tmp_path)
    write = conversion.write_tensors

    def one_element(path: Path, tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if "lora_B" in name)
        spoilt = tensors[name].clone()
        spoilt[1, -1] += 1e-4 * spoilt.abs().max()
        write(path, tensors | {name: spoilt})

    def one_bias(path: Path, tensors: dict[str, Tensor]) -> None:
        write(path, tensors | {name: tensor + 1 for name, tensor in tensors.items() if "lora_" not in name})

    def alpha(config: dict[str, object], sizes: dict[str, object]) -> dict[str, object]:
        found = with_sizes(config, sizes)
        return found | {"lora_alpha": found["lora_alpha"] * (1 + 1e-6)}

    with_sizes = conversion.with_sizes
    for function, planted in [("write_tensors", one_element), ("with_sizes", alpha)]:
        with monkeypatch.context() as patch:
            patch.setattr(conversion, function, planted)
            for source, fields in [(trained.adapter, {"initial": trained.initial}), (ours, {}), (ours, {"rank": 3})]:
                with pytest.raises(
                    ValueError, match=r"has not been written: in layer .* differs from that of the source"
                ):
                    pissa.convert(source, tmp_path / "new" / "lora", **fields)
                assert not (tmp_path / "new").exists()
    saved = train_pissa(tiny_llama(), tokens, tmp_path / "saved", modules_to_save=["norm"])
    monkeypatch.setattr(conversion, "write_tensors", one_bias)
    with pytest.raises(ValueError, match=r"tensor 'base_model\.model\..*norm\.weight' was read back with other values"):
        pissa.convert(saved.adapter, tmp_path / "new" / "lora", initial=saved.initial)
    assert not (tmp_path / "new").exists()
