"""`to="bnb4"`: plain transformers, PEFT and bitsandbytes compute the QPiSSA model that was trained."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import checkpoint_folders
import mixtures
import pissa
from daily import each
from language_models import error, logits, moved
from pissa.checkpoints.init import init

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of kernels that bitsandbytes could download
    import bitsandbytes as bnb

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")]

CLOSE = 3e-6
"""float32, two layers: products summed in another order."""

TOKENS = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1))


def base(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    checkpoint_folders.save(kind, folder / "base", dtype, **options)
    return folder / "base"


def load(folder: Path) -> nn.Module:
    """By the class of its config.json, in evaluation mode."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder).eval()


def trained(source: Path, folder: Path, **fields: Any) -> pissa.PissaModel:
    """An adapter far from its start, saved to `folder`."""
    config = pissa.PissaConfig(**{"r": 4, "quant": "nf4"} | fields)
    model = pissa.wrap(load(source), config, calibration=[TOKENS] if config.needs_calibration else None)
    moved(model)
    model.save_pretrained(folder)
    return model.eval()


def exported(folder: Path) -> nn.Module:
    """As anybody loads it: PEFT on transformers. The layers of bitsandbytes are in training mode, in which they compute
    in the dtype of their input on a CPU too."""
    model = peft.PeftModel.from_pretrained(load(folder), folder / "adapter").eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.train()
    return model


def packed(folder: Path) -> int:
    return sum(isinstance(module, bnb.nn.Linear4bit) for module in load(folder).modules())


FIELDS: dict[str, dict[str, Any]] = {
    "qpissa": {},
    "alternations": {"quant_iters": 3},
    "lora on qpissa's base": {"init": "lora", "repair": "pissa"},
    "pissa on qlora's base": {"repair": "lora"},
    "pissa on a repair's base": {"repair": "activations", "quant_iters": 3, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 3}},
    "more tensors": {"bias": "all", "modules_to_save": ["norm", "lm_head"]},
    "tokens": {"trainable_token_indices": [1, 5]},
    "single scales": {"double_quant": False},
    "a repair by activations": {"init": "lora", "repair": "activations"},
    "error feedback and a repair": {"init": "lora", "repair": "activations", "error_feedback": True},
    "a stored output layer": {"target_modules": ["lm_head", "q_proj"]},
}


RANKS = {"lora on qpissa's base": 8, "pissa on qlora's base": 8}
RANKS |= {"a repair by activations": 8, "error feedback and a repair": 8}
RANKS |= {"pissa on a repair's base": 12}
"""That of the training is 4. The plain LoRA of the unmodified base has twice that rank."""

DAILY = ["qpissa", "lora on qpissa's base", "pissa on a repair's base", "dora", "rslora, patterns", "more tensors"]
DAILY += ["error feedback and a repair"]


@pytest.mark.parametrize("name", each(FIELDS, DAILY))
def test_it_is_the_trained_function(name: str, tmp_path: Path) -> None:
    source = base(tmp_path, attention_bias=True)
    model = trained(source, tmp_path / "run", **FIELDS[name])
    done = pissa.export(tmp_path / "run", tmp_path / "out", "bnb4")  # of the base that the adapter names
    assert packed(tmp_path / "out") == done.layers
    assert error(logits(exported(tmp_path / "out"), TOKENS), logits(model, TOKENS)) < CLOSE
    assert done.error == 0
    out = str(tmp_path / "out")
    assert done.load == f"PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained({out!r}), {f'{out}/adapter'!r})"
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == RANKS.get(name, 4)
    assert bool(config["rank_pattern"]) == ("rank_pattern" in FIELDS[name])


def test_a_second_adapter_of_another_rank_and_scaling(tmp_path: Path) -> None:
    """The residual lacks the start of the first one."""
    source = base(tmp_path)
    model = pissa.wrap(load(source), r=4, quant="nf4")
    model.add_adapter("other", pissa.PissaConfig(r=3, lora_alpha=6, quant="nf4"))
    model.set_adapter("other")
    moved(model)
    model.save_pretrained(tmp_path / "run", selected_adapters=["other"])
    pissa.export(tmp_path / "run" / "other", tmp_path / "out", "bnb4", base=source)
    assert error(logits(exported(tmp_path / "out"), TOKENS), logits(model.eval(), TOKENS)) < CLOSE


def test_a_bfloat16_checkpoint_in_shards(tmp_path: Path) -> None:
    source = base(tmp_path, dtype=torch.bfloat16, shards="30KB")
    model = trained(source, tmp_path / "run")
    pissa.export(tmp_path / "run", tmp_path / "out", "bnb4", base=source)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(list(source.glob("*.safetensors"))) > 3
    found = exported(tmp_path / "out")
    exact = logits(model.float(), TOKENS)
    ours = error(logits(pissa.PissaModel.from_pretrained(load(source), tmp_path / "run"), TOKENS), exact)
    assert error(logits(found, TOKENS), exact) < 2 * ours
    name = "model.layers.1.mlp.down_proj"
    state = load_file(next(path for path in sorted((tmp_path / "out").glob("*.safetensors")) if holds(path, name)))
    codes = model.base_model.model.get_submodule(name).base.residual.codes
    assert torch.equal(state[f"{name}.weight"].flatten(), codes)


def holds(path: Path, name: str) -> bool:
    return f"{name}.weight" in load_file(path)


@pytest.mark.parametrize("fields", each([{}, {"quant_iters": 3}], [{"quant_iters": 3}]), ids=str)
def test_the_codes_of_a_folder_that_was_split_are_taken(fields: dict[str, Any], tmp_path: Path) -> None:
    """The adapter names that folder as its base, or the checkpoint is given: the same model."""
    source = base(tmp_path)
    init(source, tmp_path / "split", pissa.PissaConfig(r=4, quant="nf4", **fields))
    model = pissa.load(tmp_path / "split")
    moved(model)
    model.save_pretrained(tmp_path / "run")
    for name, given in {"a": tmp_path / "split", "b": source}.items():
        pissa.export(tmp_path / "run", tmp_path / name, "bnb4", base=given)
        assert error(logits(exported(tmp_path / name), TOKENS), logits(model.eval(), TOKENS)) < CLOSE
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert not (tmp_path / "a" / "pissa.json").exists()


def gpt2() -> nn.Module:
    """Of Conv1D, and with an output layer that is not tied."""
    sizes = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, tie_word_embeddings=False))


CANNOT_KEEP: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"exclude_modules": ["o_proj"]},  # of rows shorter than a block, as below
    "gpt_oss": {"exclude_modules": ["o_proj"]},
    "gpt2": {"target_modules": ["c_attn", "lm_head"]},
}


@pytest.mark.parametrize("kind", each(CANNOT_KEEP, ["qwen3_moe", "gpt_oss", "gpt2"]))
def test_what_bitsandbytes_cannot_keep_is_decoded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused experts and Conv1D: dense, exactly in a checkpoint in float32."""
    # Blocks of 64 in whole rows: on a CPU bitsandbytes 0.50.2 decodes nothing else rightly.
    monkeypatch.setitem(mixtures.SIZES, "hidden_size", 64)
    monkeypatch.setitem(checkpoint_folders.KINDS, "gpt2", gpt2)
    source = base(tmp_path, kind)
    model = trained(source, tmp_path / "run", **CANNOT_KEEP[kind])
    done = pissa.export(tmp_path / "run", tmp_path / "out", "bnb4", base=source)
    assert error(logits(exported(tmp_path / "out"), TOKENS), logits(model, TOKENS)) < CLOSE
    assert "decoded, since bitsandbytes has no experts and no Conv1D in 4 bits" in done.written
    assert 0 < packed(tmp_path / "out") < done.layers
    assert done.error == 0


def test_decoded_experts_are_rounded_to_the_checkpoints_dtype(tmp_path: Path) -> None:
    source = base(tmp_path, "mixtral", torch.bfloat16)
    trained(source, tmp_path / "run")
    done = pissa.export(tmp_path / "run", tmp_path / "out", "bnb4", base=source)
    assert 0 < done.error < 2**-8


# ---- What is refused -------------------------------------------------------------------------------------------------


def refuses(message: str, adapter: Path, source: Path | None, **options: Any) -> None:
    target = adapter.parent / "refused"
    with pytest.raises(ValueError, match=message):
        pissa.export(adapter, target, "bnb4", base=source, **options)
    assert not target.exists()


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    source = base(tmp_path)
    for name, fields in {"implicit": {"quant": None}, "int8": {"quant": "int8"}}.items():
        trained(source, tmp_path / name, **fields)
        refuses(rf"not in 4 bits \({name}\).*run `pissa merge .*--quant nf4", tmp_path / name, source)


def test_an_adapter_on_4_bits_is_what_it_should_become(tmp_path: Path) -> None:
    source = base(tmp_path)
    init(source, tmp_path / "split", pissa.PissaConfig(r=4, quant="nf4"))
    message = r"pissa_init is a plain LoRA on .*split, which transformers and PEFT load as they are"
    refuses(message, tmp_path / "split" / "pissa_init", tmp_path / "split")


def test_experts_that_only_we_read_are_refused(tmp_path: Path) -> None:
    """The checkpoint that was split does."""
    source = base(tmp_path, "mixtral")
    init(source, tmp_path / "split", pissa.PissaConfig(r=4, quant="nf4"), experts="nf4")
    pissa.load(tmp_path / "split").save_pretrained(tmp_path / "run")
    message = (
        r"split has the experts of .*gate_up_proj in 4 bits, which only pissa\.load reads: give the checkpoint that"
    )
    refuses(message, tmp_path / "run", tmp_path / "split")
    pissa.export(tmp_path / "run", tmp_path / "out", "bnb4", base=source)


def test_refusals_by_name(tmp_path: Path) -> None:
    source = base(tmp_path, "gpt2")
    trained(source, tmp_path / "run", target_modules=["c_attn"])
    refuses("has no linear layer in 4 bits, the only kind of layer that bitsandbytes stores", tmp_path / "run", source)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    refuses(r"names no base model \(base_model_name_or_path\): give it \(base\)", tmp_path / "run", None)
    with pytest.raises(ValueError, match="to: got 'onnx'; allowed: 'bnb4', 'vllm', 'gguf'"):
        pissa.export(tmp_path / "run", tmp_path / "out", "onnx")  # type: ignore[arg-type]
