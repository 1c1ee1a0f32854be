"""Adapters on disk: exact restart, plain LoRA for everybody else, and saving that loses nothing."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

import pissa
from daily import each
from language_models import EVERY_FORM, Make, error, logits, train
from pissa import PissaConfig, PissaModel, notices
from pissa.base.digest import is_fingerprint
from pissa.containers.staged import staged

forms = pytest.mark.parametrize("form", each(EVERY_FORM, ["implicit", "nf4"]))
pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


def test_inference_tensors_are_saved_with_the_values_that_they_have(tiny_llama: Make, tmp_path: Path) -> None:
    """They count no changes in place, so that their fingerprints are not remembered."""
    with torch.inference_mode():
        base = tiny_llama(num_hidden_layers=1)
        model = pissa.wrap(base, r=2, target_modules=["q_proj"])
        weight = base.get_parameter("model.layers.0.self_attn.q_proj.base_layer.weight")
        saved = []
        for folder in (tmp_path / "first", tmp_path / "second"):
            model.save_pretrained(folder)
            weight.mul_(2)
            [record] = json.loads((folder / "pissa.json").read_text())["layers"].values()
            saved.append(record["weight"])
    assert is_fingerprint(saved[0], weight / 4)
    assert is_fingerprint(saved[1], weight / 2)


def decomposes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a decomposition is an error, as the one of `wrap` shows."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a decomposition")

    for name in ("split_many", "svd_lowrank"):
        monkeypatch.setattr(pissa.ops, name, forbidden)
    with pytest.raises(AssertionError, match="a decomposition"):
        pissa.wrap(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"], r=2)


# -- what comes back


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restores_to_the_bit(
    form: str,
    dtype: torch.dtype,
    tiny_llama: Make,
    tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = pissa.wrap(tiny_llama(dtype=dtype), r=4, lora_alpha=6, **EVERY_FORM[form])
    train(model, tokens)
    model.save_pretrained(tmp_path)
    expected = logits(model, tokens)
    goes_on = train(model, tokens)

    decomposes_nothing(monkeypatch)
    again = PissaModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path, is_trainable=True)
    assert torch.equal(logits(again, tokens), expected)
    assert train(again, tokens) == goes_on
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    frozen = PissaModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path)
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@forms
def test_plain_peft_loads_it_onto_the_unmodified_base(
    form: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    model = pissa.wrap(
        tiny_llama(),
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7},
        alpha_pattern={"v_proj": 3, "layers.1.mlp.up_proj": 5},
        **EVERY_FORM[form],
    )
    train(model, tokens)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.keys() == peft.LoraConfig().to_dict().keys()
    assert (config["peft_type"], config["r"], config["init_lora_weights"]) == ("LORA", 8, True)
    plain = logits(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path), tokens)
    if "quant" in EVERY_FORM[form]:  # the error of the quantisation is what is missing
        with model.disable_adapter():
            base = logits(model, tokens)
        lacking = error(base, logits(tiny_llama(), tokens))
        assert 0.2 * lacking < error(plain, logits(model, tokens)) < 2 * lacking
    else:
        assert error(plain, logits(model, tokens)) <= 1e-5


def test_saved_tensors_are_pefts(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(dtype=torch.bfloat16), r=4, target_modules=["q_proj"])
    train(model, tokens)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    layer = model.base_model.model.get_submodule(name)
    a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    start, da, db = layer.start_of("default"), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert len(tensors) == 4
    assert a.dtype == b.dtype == torch.float32
    assert torch.equal(a, torch.cat([start.a0 + da, da]))
    assert torch.equal(b, torch.cat([db, start.b0], dim=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "pissa.json",
        "pissa.safetensors",
    ]


def test_the_seed_is_kept(tiny_llama: Make, tmp_path: Path) -> None:
    """Those of a stored base beside those of the adapter, which has another rank."""
    given, seed = {"target_modules": ["q_proj"], "seed": 8}, 8
    model = pissa.wrap(tiny_llama(), r=4, quant="nf4", **given)
    model.add_adapter("second", PissaConfig(r=2, **given))
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "second" / "pissa.json").read_text())
    assert record["config"]["seed"] == seed
    assert {layer["base"]["seed"] for layer in record["layers"].values()} == {seed}
    again = PissaModel.from_pretrained(tiny_llama(), tmp_path / "second", adapter_name="second")
    assert again.peft_config["second"].seed == seed
    base = again.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert ("seed", seed) in base.start.origin.identity


@forms
def test_several_adapters(form: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(), r=4, **EVERY_FORM[form])
    model.add_adapter("second", PissaConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("same", PissaConfig(r=4))
    expected = {}
    for name in ("default", "second", "same"):
        model.set_adapter(name)
        train(model, tokens)
        expected[name] = logits(model, tokens)
    model.save_pretrained(tmp_path / "all")
    assert (tmp_path / "all" / "second" / "pissa.json").is_file()
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert not (tmp_path / "one" / "pissa.json").exists()

    again = PissaModel.from_pretrained(tiny_llama(), tmp_path / "all")
    again.train().load_adapter(tmp_path / "all" / "same", "same", is_trainable=True)
    assert again.training
    again.load_adapter(tmp_path / "all" / "second", "second")
    assert not again.training
    trainable = {name.split(".")[-2] for name, p in again.named_parameters() if p.requires_grad}
    assert trainable == {"same"}
    for name, values in expected.items():
        again.set_adapter(name)
        assert torch.equal(logits(again, tokens), values), name
    layer = again.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.start_of("same") is layer.start_of("default")

    # alone, on a base of its own: with a stored base this is a residual of another adapter's factors
    alone = PissaModel.from_pretrained(tiny_llama(), tmp_path / "one" / "second", adapter_name="other")
    model.set_adapter("second")
    for name in ("default", "same"):
        model.delete_adapter(name)
    if form == "implicit":
        assert torch.equal(logits(alone, tokens), expected["second"])
    else:  # other layers, which this adapter does not have, are dense in `alone`
        layer, twin = (m.base_model.model.model.layers[0].self_attn.q_proj for m in (model, alone))
        x = torch.randn(5, 64)
        assert torch.equal(layer(x), twin(x))


def test_an_adapter_that_is_there_takes_over_the_start(tiny_llama: Make, tmp_path: Path) -> None:
    pissa.wrap(tiny_llama(), r=4, init="lora").save_pretrained(tmp_path / "a")
    model = pissa.wrap(tiny_llama(), r=4)
    model.load_adapter(tmp_path / "a", "default")
    assert model.peft_config["default"].init == "lora"
    model.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "pissa.json").read_bytes() == (tmp_path / "a" / "pissa.json").read_bytes()


def test_saves_a_merged_model(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(), r=4, quant="nf4")
    train(model, tokens)
    expected = logits(model, tokens)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PissaModel.from_pretrained(tiny_llama(), tmp_path), tokens), expected)


def test_a_merged_model_with_biases_and_another_adapter(tmp_path: Path) -> None:
    """What merged layers keep of the base, their own bias too, is in the file of no adapter."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def base() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()

    x = torch.arange(12)[None]
    model = pissa.wrap(base(), r=2, target_modules=["c_attn"])
    model.add_adapter("second", PissaConfig(r=2, target_modules=["c_fc"]))
    train(model, x)
    expected = logits(model, x)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PissaModel.from_pretrained(base(), tmp_path), x), expected)
    assert torch.equal(logits(PissaModel.from_pretrained(base(), tmp_path / "second"), x), logits(base(), x))


def test_a_given_state_dict_is_saved(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(), r=4)
    train(model, tokens)
    expected, state = logits(model, tokens), {name: t.clone() for name, t in model.state_dict().items()}
    train(model, tokens)
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(logits(PissaModel.from_pretrained(tiny_llama(), tmp_path), tokens), expected)


def test_a_part_of_a_frozen_factor_is_not_saved(tiny_llama: Make, tmp_path: Path) -> None:
    """Parts of frozen weights of the base are left out."""
    model = pissa.wrap(tiny_llama(), r=4, inference_mode=True)
    factor = model.get_parameter("base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight")
    factor.ds_id, factor.data = 0, torch.empty(0)  # as DeepSpeed's ZeRO-3 has them
    with pytest.raises(ValueError, match=r"holds only a part of .*1\.self_attn\.q_proj\.lora_A\.default\.weight"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


# -- manners of save_pretrained


def test_arguments_of_save_pretrained(tiny_llama: Make, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(), r=4)
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="safe_serialization=False"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    for name, others in (("saved", {}), ("converted", {"path_initial_model_for_weight_conversion": "x"})):
        model.save_pretrained(tmp_path / name, **others)
    for path in (tmp_path / "saved").iterdir():  # they are converted already
        assert path.read_bytes() == (tmp_path / "converted" / path.name).read_bytes()
    with pytest.raises(ValueError, match=r"invalid `selected_adapters`.*\['default'\] - got \['nope'\]"):
        model.save_pretrained(tmp_path, selected_adapters=["default", "nope"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "file", "saved"]


def test_a_quantised_base_is_said_once(tiny_llama: Make, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(), r=4, quant="nf4")
    with pytest.warns(notices.InexactLoraWarning, match="stored as nf4") as caught:
        model.save_pretrained(tmp_path)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", notices.InexactLoraWarning)
        model.save_pretrained(tmp_path)
        for exact in ({}, {"residual": "explicit"}):
            pissa.wrap(tiny_llama(), r=4, **exact).save_pretrained(tmp_path)


@pytest.mark.parametrize("card", [b"\xff\xfe", b"---\n[bad\n---\n", None], ids=repr)
def test_a_card_that_cannot_be_updated_does_not_cost_the_adapter(
    card: bytes | None, tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "README.md"
    path.mkdir() if card is None else path.write_bytes(card)
    model = pissa.wrap(tiny_llama(), r=4)
    train(model, tokens)
    with pytest.raises((OSError, ValueError, yaml.YAMLError)):  # PEFT's
        model.save_pretrained(tmp_path)
    assert path.is_dir() if card is None else path.read_bytes() == card
    assert torch.equal(logits(PissaModel.from_pretrained(tiny_llama(), tmp_path), tokens), logits(model, tokens))


def test_files_are_flushed_before_the_first_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then their folder. What a crash between two renames leaves: test_folder.py."""
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, call=call: (done.append(name), call(*args)))
    with staged(tmp_path) as new:
        for name in "ab":
            new(name).write_text(name)
        assert not done
    folders = ["fsync"] * hasattr(os, "O_DIRECTORY")
    assert done == ["fsync", "fsync", "replace", "replace", *folders]


def fail_after_writing(new: Callable[[str], Path]) -> None:
    new("a").write_text("1")
    raise ZeroDivisionError


def test_staged_files_that_fail_leave_no_new_folder(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for folder in (tmp_path / "old" / "a" / "b", tmp_path / "old"):
        with pytest.raises(ZeroDivisionError), staged(folder) as new:
            fail_after_writing(new)
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]
