"""Adapters of every PiSSA layout as a plain LoRA: the same function in plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import devices
import pissa
from architectures import ARCHITECTURES
from daily import each
from language_models import FORMS, Make, error, logits, train
from lora_files import CLOSE, NAMES, PATTERNS, check_best, check_difference, config_of, files, train_ours
from peft_adapters import plain_logits, save_subtracted, train_on_residual, train_pissa
from pissa import notices

FIELDS: dict[str, dict[str, object]] = {
    "rslora, patterns": {"use_rslora": True, **PATTERNS},
    "dora": {"use_dora": True, "lora_alpha": 6},
    "more tensors": {"bias": "lora_only", "modules_to_save": ["norm"]},
}

# ---- Our own adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_our_folder_becomes_a_plain_lora(
    fields: dict[str, object], tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    model = train_ours(tiny_llama, tokens, tmp_path / "ours", **fields)
    done = pissa.convert(tmp_path / "ours", tmp_path / "lora")
    assert files(tmp_path / "lora") == NAMES
    assert done.kept == 1
    ours, lora = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "lora"))
    assert ours.keys() == lora.keys()
    assert all(torch.equal(tensor, lora[name]) for name, tensor in ours.items())
    assert error(plain_logits(tiny_llama(), tmp_path / "lora", tokens), logits(model, tokens)) < CLOSE


@pytest.mark.parametrize("form", ["explicit", "nf4"])
def test_a_stored_residual_is_mentioned(form: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(), r=4, **FORMS[form])
    train(model, tokens)
    model.warned_of_plain_lora = True
    model.save_pretrained(tmp_path / "ours")
    with pytest.warns(notices.InexactLoraWarning, match=f"stored as {form}") as caught:
        pissa.convert(tmp_path / "ours", tmp_path / "lora")
    assert caught[0].filename == __file__
    model.eval()
    with model.disable_adapter():
        lacking = error(logits(model, tokens), logits(tiny_llama(), tokens))
    found = error(plain_logits(tiny_llama(), tmp_path / "lora", tokens), logits(model, tokens))
    assert found <= max(2 * lacking, CLOSE)


ARCHITECTURE = ["mixtral", "llama4", "llama, embeddings targeted", "vit, patches targeted"]
NIGHTLY = ["deepseek_v2", "gpt2", "roberta"]


@pytest.mark.parametrize("name", each([*ARCHITECTURE, *NIGHTLY], ARCHITECTURE))
@pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning")
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
    plain = peft.PeftModel.from_pretrained(architecture.make(), tmp_path / "lora").eval()
    with torch.no_grad():
        assert error(plain(**batch).logits, expected) < CLOSE

    low = pissa.convert(tmp_path / "ours", tmp_path / "low", rank=3)
    peft.PeftModel.from_pretrained(architecture.make(), tmp_path / "low")
    check_best(tmp_path / "ours", tmp_path / "low", low, 3)


# ---- PEFT's PiSSA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_pefts_pissa_on_the_unmodified_base(
    fields: dict[str, object], tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    trained = train_pissa(tiny_llama(), tokens, tmp_path, **fields)
    done = pissa.convert(trained.adapter, tmp_path / "lora", initial=trained.initial)
    assert files(tmp_path / "lora") == NAMES
    assert all(written == 2 * before for before, written in done.ranks.values())
    check_difference(tmp_path / "lora", trained.adapter, trained.initial)
    assert config_of(tmp_path / "lora")["init_lora_weights"] is True
    # PEFT's residual is rounded to float32
    assert error(plain_logits(tiny_llama(), tmp_path / "lora", tokens), trained.logits) < CLOSE


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_without_the_initial_adapter_it_is_refused(init: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """With the initial adapter it does not matter how the start was found."""
    trained = train_pissa(tiny_llama(), tokens, tmp_path, init=init)
    words = rf"init_lora_weights is '{init}', which changes .*--initial DIR.* path_initial_model_for_weight_conversion"
    with pytest.raises(ValueError, match=words):
        pissa.convert(trained.adapter, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
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
    done = pissa.convert(trained.adapter, tmp_path / "lora", initial=trained.initial)
    assert done.ranks["transformer.wte"][1] == 4
    assert done.ranks["transformer.h.0.attn.c_attn"][1] == 8
    base = architecture.make()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.clone())
    assert error(plain_logits(base, tmp_path / "lora", tokens), trained.logits) < CLOSE


def test_an_output_layer_s_own_weight_becomes_the_base_s(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """PEFT saves the output layer's weight beside its adapter, which is W - s B0 A0 with PiSSA."""
    trained = train_pissa(tiny_llama(), tokens, tmp_path, target_modules=["lm_head", "q_proj"])
    name = "base_model.model.lm_head.base_layer.weight"
    assert name in load_file(trained.adapter / "adapter_model.safetensors")
    pissa.convert(trained.adapter, tmp_path / "lora", initial=trained.initial)
    weight = load_file(tmp_path / "lora" / "adapter_model.safetensors")[name]
    # One rounding of W - s B0 A0, a product of 4 terms in float32, and one of the sum
    assert torch.allclose(weight, devices.fetch(tiny_llama().lm_head.weight), rtol=0, atol=8 * 2**-24)
    assert error(plain_logits(tiny_llama(), tmp_path / "lora", tokens), trained.logits) < CLOSE


def test_an_embedding_s_own_weight_becomes_the_base_s(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """PEFT starts embeddings as a LoRA; an initial adapter may all the same say that their weight lacks s B0 A0."""
    trained = train_pissa(tiny_llama(), tokens, tmp_path, target_modules=["embed_tokens"], lora_alpha=4)
    place = "base_model.model.model.embed_tokens"
    initial, adapter = (load_file(folder / NAMES[1]) for folder in (trained.initial, trained.adapter))
    a0 = 0.1 * torch.randn_like(initial[f"{place}.lora_embedding_A"])
    initial[f"{place}.lora_embedding_A"] = a0
    residual, b0 = adapter[f"{place}.base_layer.weight"], initial[f"{place}.lora_embedding_B"]
    adapter[f"{place}.base_layer.weight"] = residual - (b0 @ a0).mT
    save_file(initial, trained.initial / NAMES[1], {"format": "pt"})
    save_file(adapter, trained.adapter / NAMES[1], {"format": "pt"})
    pissa.convert(trained.adapter, tmp_path / "lora", initial=trained.initial)
    weight = load_file(tmp_path / "lora" / NAMES[1])[f"{place}.base_layer.weight"]
    assert torch.allclose(weight, devices.fetch(tiny_llama().model.embed_tokens.weight), rtol=0, atol=8 * 2**-24)


def test_an_initial_adapter_of_another_run_is_refused(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    trained = train_pissa(tiny_llama(), tokens, tmp_path)
    others = {
        "has factors .* and scaling": {"r": 3},
        "and scaling 2 in the trained adapter, and .* and scaling 1 in the initial one": {"lora_alpha": 4},
        ", and no factors in the initial one": {"target_modules": ["q_proj"]},
    }
    for message, fields in others.items():
        other = train_pissa(tiny_llama(), tokens, tmp_path / str(len(message)), **fields)
        with pytest.raises(ValueError, match=message):
            pissa.convert(trained.adapter, tmp_path / "lora", initial=other.initial)
    assert not (tmp_path / "lora").exists()


# ---- The authors' layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_a_residual_model(dtype: torch.dtype, tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    trained = train_on_residual(tiny_llama, tokens, tmp_path, dtype)
    done = pissa.convert(trained.adapter, tmp_path / "lora", initial=trained.initial)
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


# ---- Plain LoRAs -----------------------------------------------------------------------------------------------------


def test_what_peft_subtracts_is_a_plain_lora(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    expected = save_subtracted(tiny_llama(), tokens, tmp_path / "peft")
    with pytest.raises(ValueError, match=r"is a plain LoRA already\. Give rank to"):
        pissa.convert(tmp_path / "peft", tmp_path / "lora")
    done = pissa.convert(tmp_path / "peft", tmp_path / "lora", rank=8, base="org/base")
    assert done.layout == "a plain LoRA"
    assert config_of(tmp_path / "lora")["base_model_name_or_path"] == "org/base"
    assert error(plain_logits(tiny_llama(), tmp_path / "lora", tokens), expected) < CLOSE
    low = pissa.convert(tmp_path / "peft", tmp_path / "low", rank=2)
    check_best(tmp_path / "peft", tmp_path / "low", low, 2)
