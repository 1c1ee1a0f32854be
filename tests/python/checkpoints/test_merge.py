"""An adapter merged into a checkpoint on disk: bit for bit what merge_and_unload makes of the model in memory."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bnb_layers  # noqa: F401  # for the values of nested scales on Windows
import pissa
from architectures import ARCHITECTURES
from checkpoint_folders import tensors_of
from daily import each
from interrupted import Interrupted
from language_models import Make, assert_equal, error, logits, moved
from mapped_files import read_tensors
from peft_adapters import save_subtracted, train_on_residual, train_pissa
from pissa import notices
from pissa.base.bitsandbytes import from_state
from pissa.checkpoints import trained as trained_module
from pissa.checkpoints.init import init
from pissa.checkpoints.merge import merge
from pissa.checkpoints.output import FINISHED
from pissa.layers.layer import pissa_layers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of kernels that bitsandbytes could download
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

CLOSE = 1e-5
"""float32, two layers: products summed in another order."""

BFLOAT16 = {"dtype": torch.bfloat16}


@pytest.fixture
def base(tiny_llama: Make, tmp_path: Path) -> Path:
    """A model in bfloat16, in several files."""
    tiny_llama(**BFLOAT16).save_pretrained(tmp_path / "base", max_shard_size="30KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    return tmp_path / "base"


@pytest.fixture
def base32(tiny_llama: Make, tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path, **options: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


# ---- Our adapters ----------------------------------------------------------------------------------------------------

FIELDS: dict[str, dict[str, Any]] = {
    "implicit": {},
    "explicit": {"residual": "explicit"},
    "nf4": {"quant": "nf4"},
    "int8": {"quant": "int8"},
    "dora": {"use_dora": True},
    "nf4, dora": {"quant": "nf4", "use_dora": True},
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 3}},
    "alternations": {"quant": "nf4", "quant_iters": 3},
    "repaired": {"quant": "nf4", "repair": "pissa", "init": "lora"},
    "beside alternations": {"init": "lora", "repair": "pissa", "quant": "nf4", "quant_iters": 3, "lora_alpha": 3},
    "more tensors": {"bias": "all", "modules_to_save": ["norm", "lm_head"], "quant": "nf4"},
    "tokens": {"trainable_token_indices": [1, 5], "target_modules": ["q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"], "lora_alpha": 3},
}


DAILY = (
    "implicit",
    "nf4, dora",
    "more tensors",
    "rslora, patterns",
    "beside alternations",
    "tokens",
)


@pytest.mark.parametrize("name", each(FIELDS, DAILY))
def test_it_is_merge_and_unload_bit_for_bit(name: str, base: Path, tmp_path: Path) -> None:
    model = moved(pissa.wrap(load(base), r=4, **FIELDS[name]))
    model.warned_of_plain_lora = True
    model.save_pretrained(tmp_path / "adapter")
    layers = len(pissa_layers(model.base_model.model))
    done = merge(tmp_path / "adapter", base, tmp_path / "out")
    written, given = ({path.name for path in folder.iterdir()} for folder in (tmp_path / "out", base))
    assert written == given | {FINISHED}
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert_equal(load(tmp_path / "out").state_dict(), model.merge_and_unload().state_dict())
    assert done.layers == layers
    assert 0 < done.error < 2**-8  # one rounding to bfloat16


NAMES = ["gpt2", "mixtral", "gpt_oss", "llama4", "phi3", "falcon", "t5", "roberta", "vit, patches targeted", "resnet"]
NAMES += ["qwen2_5_vl", "mamba", "whisper", "modernbert"]


@pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning")
@pytest.mark.parametrize("name", each(NAMES, ["gpt2", "mixtral", "gpt_oss", "phi3", "resnet"]))
def test_names_and_layouts_of_other_models(name: str, tmp_path: Path) -> None:
    """Conv1D, fused experts, tied embeddings, joined tensors, convolutions, heads that are trained whole."""
    architecture = ARCHITECTURES[name]
    architecture.make().save_pretrained(tmp_path / "base", max_shard_size="10KB")
    kind = type(architecture.make())
    model = moved(pissa.wrap(kind.from_pretrained(tmp_path / "base"), **architecture.config()))
    model.warned_of_plain_lora = True
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert_equal(kind.from_pretrained(tmp_path / "out").state_dict(), model.merge_and_unload().state_dict())
    assert tensors_of(tmp_path / "out").keys() == tensors_of(tmp_path / "base").keys()


def test_saved_embeddings_that_are_tied(tiny_llama: Make, tmp_path: Path) -> None:
    """PEFT saves the embeddings beside an adapter if it is asked to; of tied ones the same values twice."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 1
    model = moved(pissa.wrap(model, r=4))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert_equal(load(tmp_path / "out").state_dict(), model.merge_and_unload().state_dict())


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head", "q_proj"])
def test_a_saved_weight_is_what_the_adapter_was_trained_on(layer: str, base32: Path, tmp_path: Path) -> None:
    """Embeddings that were changed before the training, and are saved with it: those of the checkpoint are not used,
    whether they are adapted or not."""
    model = load(base32)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] *= 3
        model.lm_head.weight[6] *= -2
    model = moved(pissa.wrap(model, r=4, target_modules=[layer]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge(tmp_path / "adapter", base32, tmp_path / "out")
    assert_equal(load(tmp_path / "out").state_dict(), model.merge_and_unload().state_dict())


def test_tokens_of_tied_embeddings(tiny_llama: Make, tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = moved(pissa.wrap(load(tmp_path / "base"), r=4, trainable_token_indices=[2, 7]))
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    merged = load(tmp_path / "out")
    assert_equal(merged.state_dict(), model.merge_and_unload().state_dict())
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize(
    "fields", [{}, {"quant": "nf4"}, {"quant": "int8"}, {"quant": "nf4", "quant_iters": 3}], ids=str
)
def test_a_residual_model_is_a_base_as_well(fields: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """What `pissa init` has written, with an adapter that pissa.load has trained on it, and one that PEFT has."""
    init(base, tmp_path / "residual", pissa.PissaConfig(r=4, **fields))
    model = moved(pissa.load(tmp_path / "residual", is_trainable=True))
    model.warned_of_plain_lora = True
    model.save_pretrained(tmp_path / "ours")
    merge(tmp_path / "ours", tmp_path / "residual", tmp_path / "out")
    assert_equal(load(tmp_path / "out").state_dict(), model.merge_and_unload().state_dict())
    merge(tmp_path / "ours", base, tmp_path / "same")  # the residual is computed from the weight once more
    assert_equal(load(tmp_path / "same").state_dict(), load(tmp_path / "out").state_dict())

    shutil.copytree(tmp_path / "residual" / "pissa_init", tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(4)
    tensors = {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
    save_file(tensors, tmp_path / "theirs" / "adapter_model.safetensors", {"format": "pt"})
    done = merge(tmp_path / "theirs", tmp_path / "residual", tmp_path / "merged")
    assert done.what == "an adapter on a residual, which is the base"
    merged, residual = (tensors_of(tmp_path / name) for name in ("merged", "residual"))
    place = "model.layers.1.mlp.down_proj"
    a, b = (tensors[f"base_model.model.{place}.lora_{factor}.weight"] for factor in "AB")
    kept = decoded(residual, place)
    assert torch.equal(merged[f"{place}.weight"], (kept + b @ a).bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged.keys() == tensors_of(base).keys()


def test_experts_trained_on_a_residual_model(tmp_path: Path) -> None:
    """PEFT trains the factors in pissa_init as target_parameters; on the unmodified base they are another change."""
    architecture = ARCHITECTURES["mixtral"]
    base, batch = architecture.make(), architecture.batch()
    base.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    init(tmp_path / "base", tmp_path / "residual", pissa.PissaConfig(r=4))
    residual = type(base).from_pretrained(tmp_path / "residual")
    model = moved(peft.PeftModel.from_pretrained(residual, tmp_path / "residual" / "pissa_init", is_trainable=True))
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    merge(tmp_path / "adapter", tmp_path / "residual", tmp_path / "a")
    pissa.convert(tmp_path / "adapter", tmp_path / "lora", initial=tmp_path / "residual")
    merge(tmp_path / "lora", tmp_path / "base", tmp_path / "b")
    plain = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "lora")
    for found in (*(type(base).from_pretrained(tmp_path / name) for name in "ab"), plain):
        with torch.no_grad():
            assert error(found.eval()(**batch).logits, expected) < CLOSE


def test_the_rounding_of_a_quantised_residual_is_mentioned(base: Path, tmp_path: Path) -> None:
    init(base, tmp_path / "residual", pissa.PissaConfig(r=4, quant="nf4"))
    message = r"residual is quantised \(bitsandbytes\).* `pissa merge .*pissa_init --base .*residual OUT`"
    for call in (
        lambda: pissa.convert(tmp_path / "residual" / "pissa_init", tmp_path / "lora", initial=tmp_path / "residual"),
        lambda: merge(tmp_path / "residual" / "pissa_init", base, tmp_path / "out"),
    ):
        with pytest.warns(notices.InexactLoraWarning, match=message):
            call()


def decoded(tensors: dict[str, Tensor], place: str) -> Tensor:
    entries = {name.removeprefix(f"{place}."): value for name, value in tensors.items() if name.startswith(f"{place}.")}
    if len(entries) == 1:
        return entries["weight"].float()
    return pissa.ops.dequantize(from_state(entries))


@pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")
def test_an_adapter_in_the_folder_of_its_base_stays_there(tiny_llama: Make, tmp_path: Path) -> None:
    """The result is a model alone: transformers would look for the base that a copied adapter_config.json names."""
    model, folder = tiny_llama(), tmp_path / "base"
    model.save_pretrained(folder)
    expected = moved(pissa.wrap(model, r=4))
    expected.save_pretrained(tmp_path / "run")
    for name in ("adapter_config.json", "adapter_model.safetensors", "pissa.safetensors"):
        shutil.copyfile(tmp_path / "run" / name, folder / name)
    merge(tmp_path / "run", folder, tmp_path / "out")
    init(folder, tmp_path / "split", pissa.PissaConfig(r=4))
    assert_equal(load(tmp_path / "out").state_dict(), expected.merge_and_unload().state_dict())
    for out in ("out", "split"):
        assert not (tmp_path / out / "adapter_config.json").exists()


def test_a_base_in_4_bits(base: Path, tmp_path: Path) -> None:
    """QLoRA: what bitsandbytes made of the weights is decoded; all layers are dense then."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load(base, quantization_config=config).save_pretrained(tmp_path / "packed")
    model = moved(peft.get_peft_model(load(base), peft.LoraConfig(r=4, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    merge(tmp_path / "adapter", tmp_path / "packed", tmp_path / "out")
    out, packed = (tensors_of(tmp_path / name) for name in ("out", "packed"))
    assert out.keys() == tensors_of(base).keys()
    place = "model.layers.0.self_attn.q_proj"
    a, b = (factors[f"base_model.model.{place}.lora_{factor}.weight"].float() for factor in "AB")
    assert torch.equal(out[f"{place}.weight"], (decoded(packed, place) + 2.0 * (b @ a)).bfloat16())
    place = "model.layers.0.self_attn.k_proj"
    assert torch.equal(out[f"{place}.weight"], decoded(packed, place).bfloat16())

    model = moved(pissa.load(tmp_path / "packed", is_trainable=True, r=4, target_modules=["q_proj", "up_proj"]))
    model.save_pretrained(tmp_path / "ours")
    merge(tmp_path / "ours", tmp_path / "packed", tmp_path / "merged")
    merged, expected = (tensors_of(tmp_path / "merged"), model.merge_and_unload().state_dict())
    for place in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"):
        assert torch.equal(merged[f"{place}.weight"], expected[f"{place}.weight"])


# ---- Adapters of PEFT ------------------------------------------------------------------------------------------------

THEIRS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "biases": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "biases of the factors": {"lora_bias": True, "target_modules": ["q_proj"]},
    "more tensors": {"modules_to_save": ["norm"], "trainable_token_indices": [3, 4]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
}


@pytest.mark.parametrize("fields", THEIRS.values(), ids=THEIRS)
def test_a_lora_of_peft(fields: dict[str, Any], tiny_llama: Make, tmp_path: Path) -> None:
    """In float32 PEFT, too, rounds once."""
    tiny_llama(attention_bias=True).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "lora_alpha": 3} | fields)
    model = moved(peft.get_peft_model(load(tmp_path / "base"), config))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have invalid shape.*lora_B.bias", UserWarning)  # PEFT of its own biases
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert_equal(load(tmp_path / "out").state_dict(), model.merge_and_unload().state_dict())


def test_a_dora_of_peft(base32: Path, tokens: Tensor, tmp_path: Path) -> None:
    model = moved(peft.get_peft_model(load(base32), peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear")))
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", base32, tmp_path / "out")
    assert error(logits(load(tmp_path / "out"), tokens), logits(model.eval(), tokens)) < CLOSE


def test_pefts_pissa_in_all_its_layouts(base32: Path, tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    trained = train_pissa(tiny_llama(), tokens, tmp_path / "a")
    authors = train_on_residual(tiny_llama, tokens, tmp_path / "b")
    subtracted = save_subtracted(tiny_llama(), tokens, tmp_path / "c" / "lora")
    pissa.convert(trained.adapter, tmp_path / "a" / "lora", initial=trained.initial)
    pissa.convert(authors.adapter, tmp_path / "b" / "lora", initial=authors.initial)
    for name, adapter, source, expected in [
        ("initial", tmp_path / "a" / "lora", base32, trained.logits),
        ("authors", tmp_path / "b" / "lora", base32, authors.logits),
        ("residual", authors.adapter, authors.initial, authors.logits),
        ("subtracted", tmp_path / "c" / "lora", base32, subtracted),
    ]:
        done = merge(adapter, source, tmp_path / name)
        assert done.layers == 14
        assert error(logits(load(tmp_path / name), tokens), expected) < CLOSE, name


# ---- Codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_codes_are_what_bitsandbytes_makes_of_the_merged_model(quant: str, base: Path, tmp_path: Path) -> None:
    model = moved(pissa.wrap(load(base), r=4, target_modules=["q_proj", "down_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    dense = merge(tmp_path / "adapter", base, tmp_path / "dense")
    done = merge(tmp_path / "adapter", base, tmp_path / "out", quant=quant)
    kinds = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }
    load(tmp_path / "dense", quantization_config=kinds[quant]).save_pretrained(tmp_path / "theirs")
    theirs, ours = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "out")
    assert theirs.keys() <= ours.keys()  # older versions lack weight_format
    for name, tensor in theirs.items():
        if "quant_state" not in name:
            assert torch.equal(ours[name].reshape(-1), tensor.reshape(-1)), name
    assert load(tmp_path / "out").config.quantization_config.quant_method == "bitsandbytes"
    assert (done.layers, done.quantised) == (4, 14)
    # What codes lose of the weights, and of the change, which is smaller than they are
    merged, unmodified = (tensors_of(folder) for folder in (tmp_path / "dense", base))
    lost = whole = lost_here = change = 0.0
    for name, weight in merged.items():
        place = name.removesuffix(".weight")
        if f"{place}.SCB" in ours or f"{place}.weight.absmax" in ours:
            square = (decoded(ours, place) - weight.float()).square().sum().item()
            lost, whole = lost + square, whole + weight.float().square().sum().item()
            if not torch.equal(weight, unmodified[name]):
                lost_here += square
                change += (weight.float() - unmodified[name].float()).square().sum().item()
    assert done.error == pytest.approx((lost / whole) ** 0.5, rel=0.02)  # it counts from the sum before it is rounded
    assert done.error_of_change == pytest.approx((lost_here / change) ** 0.5, rel=0.05)
    assert dense.error < done.error


# ---- What is refused -------------------------------------------------------------------------------------------------


def refuses(message: str, adapter: Path, source: Path, target: Path, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        merge(adapter, source, target, **options)
    assert not target.exists()


def spoil(folder: Path, change: Callable[[Tensor], Tensor], name: str) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = read_tensors(path)
        if name in tensors:
            save_file(tensors | {name: change(tensors[name]).contiguous()}, path, {"format": "pt"})


@pytest.mark.parametrize("fields", [{}, {"quant": "nf4"}], ids=["implicit", "nf4"])
def test_another_base_is_refused_by_the_first_layer_that_differs(
    fields: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    model = pissa.wrap(load(base), r=4, **fields)
    model.warned_of_plain_lora = True
    model.save_pretrained(tmp_path / "adapter")
    spoil(base, lambda weight: weight.index_fill(0, torch.tensor(3), 0.5), "model.layers.1.self_attn.k_proj.weight")
    message = r"is not the base that .*adapter was trained on: the weight of layer model\.layers\.1\.self_attn\.k_proj"
    refuses(message, tmp_path / "adapter", base, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_adapters_and_bases_that_do_not_belong_together(
    base: Path, base32: Path, tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    init(base, tmp_path / "residual", pissa.PissaConfig(r=4, target_modules=["q_proj", "v_proj"]))
    adapters: dict[str, dict[str, Any]] = {
        "implicit": {},
        "other": {"target_modules": ["q_proj"], "residual": "explicit"},
    }
    for name, fields in adapters.items():
        model = pissa.wrap(load(base), r=4, **fields)
        model.warned_of_plain_lora = True
        model.save_pretrained(tmp_path / name)
    lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"])
    peft.get_peft_model(load(base), lora).save_pretrained(tmp_path / "lora")
    message = r"was trained on the unmodified base, and .*residual has a residual of layer model\.layers\.0"
    refuses(message, tmp_path / "implicit", tmp_path / "residual", tmp_path / "out")
    message = r"does not adapt layer model\.layers\.0\.self_attn\.v_proj, of which .*residual has a residual"
    refuses(message, tmp_path / "other", tmp_path / "residual", tmp_path / "out")
    message = r"is not where .* started from: layer .*v_proj' has no factors in the trained adapter"
    refuses(message, tmp_path / "lora", tmp_path / "residual", tmp_path / "out")
    subtracted = shutil.copytree(tmp_path / "lora", tmp_path / "subtracted")
    config = json.loads((subtracted / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa"}
    (subtracted / "adapter_config.json").write_text(json.dumps(config))
    message = r"init_lora_weights is 'pissa', which changes the base, and .*residual is a residual"
    refuses(message, subtracted, tmp_path / "residual", tmp_path / "out")
    smaller = tiny_llama(num_hidden_layers=1)
    smaller.save_pretrained(tmp_path / "smaller")
    message = r"has no layer model\.layers\.1\.self_attn\.q_proj, which .* adapts: it is not the base"
    refuses(message, tmp_path / "lora", tmp_path / "smaller", tmp_path / "out")
    tiny_llama(hidden_size=32).save_pretrained(tmp_path / "narrow")
    message = (
        r"layer model\.layers\.0\.self_attn\.q_proj is \[32, 32\] in .*narrow, and its factors .* are for \[64, 64\]"
    )
    refuses(message, tmp_path / "lora", tmp_path / "narrow", tmp_path / "out")
    refuses("quant: got 'int3'; allowed: None, 'nf4', 'int8'", tmp_path / "lora", base, tmp_path / "out", quant="int3")
    with pytest.raises(ValueError, match="is not empty"):
        merge(tmp_path / "lora", base, tmp_path)


def test_what_has_no_place_in_the_checkpoint(tiny_llama: Make, tmp_path: Path) -> None:
    """A tied weight that one of two layers changes; embeddings of another size."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    for name, fields in {
        "lm_head": {"target_modules": ["lm_head"]},
        "embed_tokens": {"target_modules": ["embed_tokens"]},
    }.items():
        with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
            model = pissa.wrap(load(tmp_path / "tied"), r=4, **fields)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        refuses(rf"layer .*{name} shares its weight with", tmp_path / name, tmp_path / "tied", tmp_path / "out")
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        model = moved(pissa.wrap(load(tmp_path / "tied"), r=4, modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    message = r"is for lm_head\.weight, which shares its values with model\.embed_tokens\.weight"
    refuses(message, tmp_path / "head", tmp_path / "tied", tmp_path / "out")
    tiny_llama().save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    model.resize_token_embeddings(101)
    pissa.wrap(model, r=4).save_pretrained(tmp_path / "resized", save_embedding_layers=True)
    message = r"(lm_head|embed_tokens)\.weight' is \[101, 64\]; needed: \[97, 64\], .* An embedding that was resized"
    refuses(message, tmp_path / "resized", tmp_path / "base", tmp_path / "out")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"])
    peft.get_peft_model(load(tmp_path / "base"), lora).save_pretrained(tmp_path / "twice")
    weight = {"base_model.model.model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)}
    path = tmp_path / "twice" / "adapter_model.safetensors"
    save_file(read_tensors(path) | weight, path)
    refuses(r"q_proj\.weight' is changed for .*q_proj and ", tmp_path / "twice", tmp_path / "base", tmp_path / "out")


def test_a_weight_that_overflows_is_refused(tiny_llama: Make, tmp_path: Path) -> None:
    tiny_llama(dtype=torch.float16).save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(load(tmp_path / "base"), peft.LoraConfig(r=4, lora_alpha=1e9))
    moved(model).save_pretrained(tmp_path / "adapter")
    message = r"layer model\.layers\.0\..*: its merged weight is not finite in torch\.float16"
    refuses(message, tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    refuses(
        r"layer .model\.layers\.0\..*: weight", tmp_path / "adapter", tmp_path / "base", tmp_path / "out", quant="nf4"
    )


# ---- Runs that are interrupted ---------------------------------------------------------------------------------------


def test_a_run_does_not_go_on_by_another_plan(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter before training decides the bytes as much as the one after it, and each as its files are now."""
    init(base, tmp_path / "residual", pissa.PissaConfig(r=4))
    adapter = shutil.copytree(tmp_path / "residual" / "pissa_init", tmp_path / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr(trained_module, "read_weight", Interrupted(trained_module.read_weight, at=1))
        with pytest.raises(KeyboardInterrupt):
            merge(adapter, base, tmp_path / "out")
    for what, folder in {"initial": tmp_path / "residual" / "pissa_init", "adapter": adapter}.items():
        weights = folder / "adapter_model.safetensors"
        was = weights.stat()
        os.utime(weights, ns=(was.st_atime_ns, was.st_mtime_ns + 100))
        with pytest.raises(ValueError, match=rf"another plan: {what} adapter_model\.safetensors was"):
            merge(adapter, base, tmp_path / "out")
        os.utime(weights, ns=(was.st_atime_ns, was.st_mtime_ns))
    with pytest.raises(ValueError, match="another plan: form was 'implicit', is 'nf4"):
        merge(adapter, base, tmp_path / "out", quant="nf4")
    merge(adapter, base, tmp_path / "out")
