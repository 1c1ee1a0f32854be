"""`to="gguf"`: what is in the file. test_llama_cpp.py runs it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pissa
from checkpoint_folders import change_config
from oracle import change_all
from peft_adapters import train_on_residual
from pissa.adapters.lora_folder import open_adapter
from pissa.layers.layer import pissa_layers

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""What llama.cpp calls the layers of a block."""

ARCHITECTURES = {
    "Llama": "llama",
    "Mistral": "llama",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Gemma": "gemma",
    "Gemma2": "gemma2",
    "Gemma3": "gemma3",
}


def make(family: str, folder: Path, **fields: Any) -> Any:
    """A random model of a family, in the folder too."""
    import transformers

    name = {"Gemma3": "Gemma3Text"}.get(family, family)
    config = getattr(transformers, f"{name}Config")(**SIZES | HEADS | {"tie_word_embeddings": False} | fields)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(folder)
    return model


def trained(model: nn.Module, folder: Path, **fields: Any) -> Any:
    model = pissa.wrap(model, **{"r": 4} | fields)
    change_all(model)
    model.save_pretrained(folder)
    return model


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and the tensors of a file."""
    found = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in found.fields.items()}
    return fields, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in found.tensors}


def changes(path: Path) -> dict[str, Tensor]:
    """The change of each weight as llama.cpp computes it: alpha / rank B A, the rank being that of the tensors."""
    fields, tensors = contents(path)
    names = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    assert len(tensors) == 2 * len(names)
    pairs = {name: (tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]) for name in names}
    return {name: fields["adapter.lora.alpha"] / b.shape[1] * (b @ a) for name, (a, b) in pairs.items()}


def in_transformers_order(rows: Tensor, heads: int) -> Tensor:
    """The way back from llama.cpp's order of rows, as transformers reads a GGUF."""
    processors = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    processor = processors.LlamaTensorProcessor({})
    return torch.from_numpy(processor._reverse_permute_weights(rows.numpy(), heads, heads))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_llama_cpps_arithmetic_gives_the_change(family: str, tmp_path: Path) -> None:
    fields = {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"up_proj": 3}}
    model = trained(make(family, tmp_path / "base"), tmp_path / "run", **fields)
    done = pissa.export(tmp_path / "run", tmp_path / "out" / "lora.gguf", "gguf", base=tmp_path / "base")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora.gguf"]
    kinds = {"general.architecture": ARCHITECTURES[family], "general.type": "adapter", "adapter.type": "lora"}
    assert contents(tmp_path / "out" / "lora.gguf")[0].items() >= kinds.items()
    found = changes(tmp_path / "out" / "lora.gguf")
    layers = pissa_layers(model.base_model.model)
    assert len(found) == len(layers) == done.layers == 14
    for name, layer in layers.items():
        block, _, rest = name.removeprefix("model.layers.").partition(".")
        change = found[f"blk.{block}.{NAMES[rest]}.weight"]
        if ARCHITECTURES[family] == "llama" and rest.endswith(("q_proj", "k_proj")):
            change = in_transformers_order(change, {"q": 4, "k": 2}[rest[-6]])
        expected = layer.delta_matrix("default").detach()
        assert torch.allclose(change, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())), name


def test_embeddings_and_output_layer(tmp_path: Path) -> None:
    """llama.cpp wants the embedding's factor with a row for each token."""
    model = trained(make("Llama", tmp_path / "base"), tmp_path / "run", target_modules=["embed_tokens", "lm_head"])
    pissa.export(tmp_path / "run", tmp_path / "lora.gguf", "gguf", base=tmp_path / "base")
    _, tensors = contents(tmp_path / "lora.gguf")
    layers = pissa_layers(model.base_model.model)
    a, b = (tensors[f"token_embd.weight.lora_{factor}"] for factor in "ab")
    assert (a.shape, b.shape) == ((97, 8), (64, 8))
    expected = layers["model.embed_tokens"].delta_matrix("default").detach()
    assert torch.allclose(b @ a.mT, expected.reshape(64, 97), rtol=1e-5, atol=1e-6)
    assert {name.partition(".")[0] for name in tensors} == {"token_embd", "output"}


def test_loras_of_others(tiny_llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    """PEFT's, trained on a residual: the change of the unmodified base."""
    tiny_llama().save_pretrained(tmp_path / "base")
    theirs = train_on_residual(tiny_llama, tokens, tmp_path / "theirs")
    config = theirs.adapter / "adapter_config.json"  # which is not to name the residual, where the initial one is found
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    done = pissa.export(theirs.adapter, tmp_path / "a.gguf", "gguf", base=tmp_path / "base", initial=theirs.initial)
    assert done.what == "an adapter on a residual, and its initial adapter"
    pissa.convert(theirs.adapter, tmp_path / "lora", initial=theirs.initial)
    pissa.export(tmp_path / "lora", tmp_path / "b.gguf", "gguf", base=tmp_path / "base")
    one, other = changes(tmp_path / "a.gguf"), changes(tmp_path / "b.gguf")
    assert one.keys() == other.keys()
    assert all(torch.allclose(change, other[name], rtol=1e-5, atol=1e-7) for name, change in one.items())
    lora = open_adapter(tmp_path / "lora")
    assert math.isclose(contents(tmp_path / "b.gguf")[0]["adapter.lora.alpha"], lora.config["lora_alpha"])


# ---- What is refused -------------------------------------------------------------------------------------------------


def refuses(message: str, run: Path, base: Path | None) -> None:
    target = run.parent / "new" / "refused.gguf"
    with pytest.raises(ValueError, match=message):
        pissa.export(run, target, "gguf", base=base)
    assert not target.parent.exists()


def test_what_llama_cpp_lacks_is_refused_by_name(tmp_path: Path) -> None:
    """By what refuses it for vLLM: test_export_vllm has every field."""
    trained(make("Llama", tmp_path / "base"), tmp_path / "run", use_dora=True)
    message = r"run has use_dora=True: llama\.cpp takes nothing from an adapter but factors of layers.*Run `pissa merge"
    refuses(message, tmp_path / "run", tmp_path / "base")


def test_bases_that_do_not_do(tmp_path: Path) -> None:
    trained(make("Llama", tmp_path / "base"), tmp_path / "run", target_modules=["lm_head"])
    pissa.export(tmp_path / "run", tmp_path / "untied.gguf", "gguf", base=tmp_path / "base")
    change_config(tmp_path / "base", tie_word_embeddings=True)
    refuses(
        "layer 'lm_head', whose weight is tied to another's, and llama.cpp has but one",
        tmp_path / "run",
        tmp_path / "base",
    )
    trained(make("Llama", tmp_path / "base"), tmp_path / "run 2", target_modules=["q_proj"])
    change_config(tmp_path / "base", architectures=["FalconForCausalLM"])
    refuses("is a FalconForCausalLM; .* known here are LlamaForCausalLM, ", tmp_path / "run 2", tmp_path / "base")
    refuses(
        "nowhere/config.json cannot be read: .* describes no model that transformers .* can build",
        tmp_path / "run 2",
        tmp_path / "nowhere",
    )
    (tmp_path / "there.gguf").touch()
    with pytest.raises(ValueError, match=r"there\.gguf exists already and nothing is overwritten; choose a new file"):
        pissa.export(tmp_path / "run", tmp_path / "there.gguf", "gguf", base=tmp_path / "base")


def test_blocks_and_heads_are_those_of_the_base(tmp_path: Path) -> None:
    trained(make("Llama", tmp_path / "base", num_hidden_layers=12), tmp_path / "run", target_modules=["q_proj"])
    pissa.export(tmp_path / "run", tmp_path / "lora.gguf", "gguf", base=tmp_path / "base")
    _, tensors = contents(tmp_path / "lora.gguf")
    assert {name.rpartition(".")[0] for name in tensors} == {f"blk.{block}.attn_q.weight" for block in range(12)}
    change_config(tmp_path / "base", num_hidden_layers=11)
    message = r"factors of layer 'model\.layers\.11\.self_attn\.q_proj', which llama\.cpp has under no name"
    refuses(message, tmp_path / "run", tmp_path / "base")
    change_config(tmp_path / "base", num_hidden_layers=12, num_attention_heads=64)
    refuses("'.*', of 64 rows, which are not 64 heads, as config.json says", tmp_path / "run", tmp_path / "base")
    change_config(tmp_path / "base", num_attention_heads=0)
    refuses("config.json .*modulo by zero", tmp_path / "run", tmp_path / "base")
