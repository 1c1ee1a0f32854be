"""`to="gguf"`: what is in the file. test_llama_cpp.py runs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import pissa
from gguf_fixtures import MODELS, converted, make, write
from oracle import change_all
from pissa.cli import main
from pissa.integrations.llama_cpp import TOKENS, compare
from pissa.layers.layer import pissa_layers

IGNORED = "per_layer_model_projection"
"""A layer of Gemma 4 to which llama.cpp adds no adapter."""


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
    return {name: fields["adapter.lora.alpha"] / b.shape[-1] * (b @ a) for name, (a, b) in pairs.items()}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # of patterns that match no layer
@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpps_arithmetic_gives_the_merged_model(kind: str, tmp_path: Path) -> None:
    """The file's weights with the exported change are what the converter makes of the merged model: names, the order of
    rows and columns, stacks of experts, and scales."""
    dense, base = make(kind), tmp_path / "base.gguf"
    write(dense, kind, base)
    fields = {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"o_proj": 3}, "r": 4}
    model = pissa.load(base, target_modules="all-linear", exclude_modules=[IGNORED], init="lora", **fields)
    change_all(model)
    model.save_pretrained(tmp_path / "run")
    pissa.export(tmp_path / "run", tmp_path / "lora.gguf", "gguf")
    found, (_, stored) = changes(tmp_path / "lora.gguf"), contents(base)
    merged = model.merge_and_unload()
    changed, scales = 0, {name: scale for name, scale in stored.items() if name.endswith("ffn_down_exps.scale")}
    for name, weight, _ in converted(merged, MODELS[kind][0]):
        expected, change = weight.float(), found.pop(name, torch.zeros(()))
        scale = scales.get(name.replace(".weight", ".scale"), torch.ones(1))  # llama.cpp scales W x and adds the change
        got = stored[name].reshape(expected.shape).float() + change / scale[:, None, None].squeeze(0)
        changed += bool(change.any())
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())), name
    assert not found
    assert changed >= 8


def test_embeddings_and_output_layer(tmp_path: Path) -> None:
    """llama.cpp wants the embedding's factor with a row for each token."""
    write(make("llama"), "llama", tmp_path / "base.gguf")
    model = pissa.load(tmp_path / "base.gguf", r=4, target_modules=["embed_tokens", "lm_head"])
    change_all(model)
    model.save_pretrained(tmp_path / "run")
    pissa.export(tmp_path / "run", tmp_path / "lora.gguf", "gguf")
    _, tensors = contents(tmp_path / "lora.gguf")
    layers = pissa_layers(model.base_model.model)
    a, b = (tensors[f"token_embd.weight.lora_{factor}"] for factor in "ab")
    assert (a.shape, b.shape) == ((96, 8), (64, 8))
    expected = layers["model.embed_tokens"].delta_matrix("default").detach()
    assert torch.allclose(b @ a.mT, expected.reshape(64, 96), rtol=1e-5, atol=1e-6)
    assert {name.partition(".")[0] for name in tensors} == {"token_embd", "output"}


def test_an_adapter_of_the_dense_model(tmp_path: Path) -> None:
    """PEFT's, trained on transformers' checkpoint: the file says how its rows lie."""
    dense = make("llama")
    write(dense, "llama", tmp_path / "base.gguf")
    dense.save_pretrained(tmp_path / "dense")
    theirs = get_peft_model(dense, LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules="all-linear"))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "run")
    refuses(r"dense contains weights in 16 or 32 bits; needed: the GGUF file", tmp_path / "run", tmp_path / "dense")
    pissa.export(tmp_path / "run", tmp_path / "lora.gguf", "gguf", base=tmp_path / "base.gguf")
    found, (_, stored) = changes(tmp_path / "lora.gguf"), contents(tmp_path / "base.gguf")
    for name, weight, _ in converted(theirs.merge_and_unload(), "llama"):
        assert torch.allclose(stored[name] + found.get(name, torch.zeros(())), weight, rtol=1e-5, atol=1e-5), name


class StandIn:
    """llama.cpp's binding over transformers: the base with what the exported file changes, and from a token on others
    than the model's."""

    model: Any = None
    wrong_after = 0

    def __init__(self, path: str, lora_path: str, **_: Any) -> None:
        self.path, self.lora_path = path, lora_path

    def reset(self) -> None: ...

    def generate(self, ids: list[int], top_k: int) -> Iterator[int]:
        assert top_k == 1
        for number in count():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
            token = int(logits.argmax() if number < self.wrong_after else logits.argmin())
            ids = [*ids, token]
            yield token


@pytest.mark.parametrize("wrong_after", [TOKENS, 5])
def test_a_check_counts_equal_tokens(
    wrong_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(make("llama"), "llama", tmp_path / "base.gguf")
    model = pissa.load(tmp_path / "base.gguf", r=4, init="lora", task_type="CAUSAL_LM")
    change_all(model)
    model.save_pretrained(tmp_path / "run")
    monkeypatch.setattr(StandIn, "model", model.eval())
    monkeypatch.setattr(StandIn, "wrong_after", wrong_after)
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=StandIn))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "lora.gguf"), "--to", "gguf", "--check"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(f"the same {wrong_after} of {TOKENS} tokens") == 3
    assert ("apart in their logits" in shown) == (wrong_after < TOKENS)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "vllm", "--check"]) == 2
    assert "--check: got --to vllm; it compares with llama.cpp" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ModuleNotFoundError, match="run `pip install llama-cpp-python`"):
        compare(tmp_path / "run", None, tmp_path / "lora.gguf")


# ---- What is refused -------------------------------------------------------------------------------------------------


def refuses(message: str, run: Path, base: Path | None) -> None:
    target = run.parent / "new" / "refused.gguf"
    with pytest.raises(ValueError, match=message):
        pissa.export(run, target, "gguf", base=base)
    assert not target.parent.exists()


def test_what_llama_cpp_lacks_is_refused_by_name(tmp_path: Path) -> None:
    """By what refuses it for vLLM: test_export_vllm has every field."""
    write(make("llama"), "llama", tmp_path / "base.gguf")
    model = pissa.load(tmp_path / "base.gguf", r=4, use_dora=True)
    model.save_pretrained(tmp_path / "run")
    message = r"run has use_dora=True: llama\.cpp takes nothing from an adapter but factors of layers.*Run `pissa merge"
    refuses(message, tmp_path / "run", None)


def test_bases_that_do_not_do(tmp_path: Path) -> None:
    write(make("qwen2"), "qwen2", tmp_path / "tied.gguf")  # with tied embeddings
    model = pissa.load(tmp_path / "tied.gguf", r=4, target_modules=["lm_head"], init="lora")
    model.save_pretrained(tmp_path / "head")
    refuses("'lm_head', which the file has under no name, or under that of a layer to which", tmp_path / "head", None)
    model = pissa.load(tmp_path / "tied.gguf", r=4, target_modules=["embed_tokens"], init="lora")
    model.save_pretrained(tmp_path / "embeddings")
    refuses("'model.embed_tokens', whose weight is also the output layer's", tmp_path / "embeddings", None)
    write(make("llama"), "llama", tmp_path / "other.gguf")
    message = r"'model\.layers\.0\.mlp\.experts\.\w+', which the file has under no name"
    write(make("qwen3_moe"), "qwen3_moe", tmp_path / "experts.gguf")
    pissa.load(tmp_path / "experts.gguf", r=4, target_modules=["gate_up_proj"], init="lora").save_pretrained(
        tmp_path / "experts"
    )
    refuses(message, tmp_path / "experts", tmp_path / "other.gguf")
    model = pissa.load(tmp_path / "other.gguf", r=4, target_modules=["q_proj"], init="lora")
    model.save_pretrained(tmp_path / "run")
    message = r"'model\.layers\.0\.self_attn\.q_proj', for a weight \[128, 64\], which is \[64, 64\] in the file"
    refuses(message, tmp_path / "run", tmp_path / "tied.gguf")
    write(make("gemma4"), "gemma4", tmp_path / "gemma4.gguf")
    for name in (IGNORED, "embed_tokens_per_layer"):
        pissa.load(tmp_path / "gemma4.gguf", r=4, target_modules=[name], init="lora").save_pretrained(tmp_path / name)
        refuses(rf"'model\.{name}', to whose weight llama\.cpp adds no adapter \(exclude_mod", tmp_path / name, None)
    (tmp_path / "there.gguf").touch()
    with pytest.raises(ValueError, match=r"there\.gguf exists already and nothing is overwritten; choose a new file"):
        pissa.export(tmp_path / "run", tmp_path / "there.gguf", "gguf")
