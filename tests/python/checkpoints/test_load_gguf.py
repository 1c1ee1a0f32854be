"""pissa.load of GGUF files: the codes stay what they are, mapped, and the model computes what the original does with
the decoded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import gguf_fixtures
import pissa
from daily import each
from gguf_fixtures import MODELS, floats, mixed
from language_models import error, logits, moved, train
from pissa.base.weights import CodedEmbedding, CodedLinear
from pissa.checkpoints.init import init
from pissa.checkpoints.merge import merge
from pissa.layers.layer import pissa_layers

FIELDS: dict[str, Any] = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TOKENS = torch.arange(3, 51)[None]
DAILY = {"llama", "llama3", "mixtral", "qwen2", "qwen3_5", "gemma3", "gemma4", "gemma4_moe", "longrope", "gpt_oss"}
DAILY |= {"lfm2", "granite"}
BOUND = 5e-6
"""Of logits: sums of 64 products in another order; Qwen 3.5 repeats such differences in its state."""


def written(kind: str, folder: Path, types: Any = mixed) -> tuple[Path, nn.Module]:
    """A file, and the model that it has."""
    return folder / "x.gguf", gguf_fixtures.write(gguf_fixtures.make(kind), kind, folder / "x.gguf", types)


@pytest.mark.parametrize("types", [floats, mixed], ids=["floats", "codes"])
@pytest.mark.parametrize("kind", each(MODELS, DAILY))
@pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning")  # a gate of one row
def test_logits_are_the_originals(kind: str, types: Any, tmp_path: Path) -> None:
    path, twin = written(kind, tmp_path, types)
    model = pissa.load(path, **FIELDS, init="lora", is_trainable=False)
    assert error(logits(model, TOKENS), logits(twin, TOKENS)) <= BOUND
    bases = [type(layer.base_layer) for layer in pissa_layers(model).values()]
    assert (CodedLinear in bases) == (types is mixed)
    assert model.peft_config["default"].base_model_name_or_path == str(path)
    assert model.generation_config.eos_token_id == 2


def test_a_file_of_ollama_has_the_name_of_its_digest(tmp_path: Path) -> None:
    path, twin = written("llama", tmp_path)
    blob = path.rename(tmp_path / "sha256-74701a8c35f6c8d9")
    model = pissa.load(blob, **FIELDS, init="lora", is_trainable=False)
    assert error(logits(model, TOKENS), logits(twin, TOKENS)) <= BOUND


@pytest.mark.parametrize("start", ["lora", "pissa"])
@pytest.mark.parametrize("kind", each(["llama", "mixtral", "gpt_oss", "gemma3", "gemma4"], {"llama", "mixtral"}))
def test_a_trained_adapter_is_saved_and_loaded(kind: str, start: str, tmp_path: Path) -> None:
    path, twin = written(kind, tmp_path)
    model = pissa.load(path, **FIELDS, init=start)
    assert error(logits(model.eval(), TOKENS), logits(twin, TOKENS)) <= BOUND
    losses = train(model.train(), TOKENS, 4)
    assert losses[-1] < losses[0]
    expected = logits(model.eval(), TOKENS)
    model.save_pretrained(tmp_path / "run")
    again = pissa.load(path, adapter=tmp_path / "run", is_trainable=False)
    assert error(logits(again, TOKENS), expected) <= BOUND
    with again.disable_adapter():
        assert error(logits(again, TOKENS), logits(twin, TOKENS)) <= BOUND


@pytest.mark.parametrize("kind", each(["qwen2", "gpt_oss", "gemma4_moe"], {"qwen2", "gpt_oss"}))
def test_a_merged_model_is_dense_and_is_saved(kind: str, tmp_path: Path) -> None:
    """Also embeddings, tied ones once, and the experts, to which no adapter belongs."""
    path, _ = written(kind, tmp_path)
    model = moved(pissa.load(path, r=2, target_modules=["q_proj"], init="lora")).eval()
    trained = logits(model, TOKENS)
    merged: Any = model.merge_and_unload()
    assert error(logits(merged, TOKENS), trained) <= BOUND
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied == merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(merged)
    assert torch.equal(logits(again, TOKENS), logits(merged, TOKENS))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("lm_head", {"modules_to_save": ["lm_head"]}),
        ("model.embed_tokens", {"modules_to_save": ["embed_tokens"]}),
        ("model.embed_tokens", {"trainable_token_indices": [5]}),
    ],
)
def test_a_layer_in_codes_is_not_trained_as_a_whole(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    path, _ = written("llama", tmp_path)
    with pytest.raises(ValueError, match=rf"layer '{name}' is in codes, .*: adapt it \(target_modules\)"):
        pissa.load(path, r=2, init="lora", **fields)


def test_codes_are_not_saved_as_weights(tmp_path: Path) -> None:
    path, _ = written("llama", tmp_path)
    model = pissa.load(path, r=2, target_modules=["q_proj"], init="lora")
    for base in (model.get_base_model(), model.unload()):
        with pytest.raises(ValueError, match=r"model\.embed_tokens is in codes, .* merge_and_unload\(\)"):
            base.save_pretrained(tmp_path / "out")
    assert not [*(tmp_path / "out").glob("*.safetensors")]


def test_the_table_of_per_layer_inputs_stays_in_codes(tmp_path: Path) -> None:
    path, twin = written("gemma4", tmp_path)
    model: Any = pissa.load(path, r=2, target_modules=["q_proj"], init="lora").get_base_model()
    tables = [model.model.embed_tokens_per_layer, model.model.embed_tokens]
    assert [(type(table), table.format) for table in tables] == [(CodedEmbedding, "q8_0")] * 2
    assert tables[0].quantized.shape == (96, 4 * 32)
    originals: Any = [twin.model.embed_tokens_per_layer, twin.model.embed_tokens]  # with scales
    for ours, theirs in zip(tables, originals, strict=True):
        assert torch.equal(ours(TOKENS), theirs(TOKENS))


def test_an_adapter_of_another_file_is_refused(tmp_path: Path) -> None:
    path, _ = written("llama", tmp_path)
    moved(pissa.load(path, **FIELDS)).save_pretrained(tmp_path / "run")
    model: Any = gguf_fixtures.make("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    gguf_fixtures.write(model, "llama", path, mixed)
    with pytest.raises(ValueError, match=r"is not the base that .* was trained on"):
        pissa.load(path, adapter=tmp_path / "run")


def test_dtype_of_the_model(tmp_path: Path) -> None:
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "Q8_0": torch.float32}
    for kind, dtype in kinds.items():
        (folder := tmp_path / kind).mkdir()
        path, _ = written("qwen3", folder, lambda _, values, kind=kind: kind if values.dim() > 1 else "F32")
        for asked, found in {None: dtype, torch.bfloat16: torch.bfloat16}.items():
            model = pissa.load(path, **FIELDS, dtype=asked)
            assert model.get_base_model().model.norm.weight.dtype == found
            assert logits(model, TOKENS).dtype == found


@pytest.mark.parametrize("kind", each(["llama", "mixtral", "gpt_oss", "gemma4", "gemma4_moe"], {"mixtral"}))
def test_init_and_merge_read_a_file_decoded(kind: str, tmp_path: Path) -> None:
    path, twin = written(kind, tmp_path, lambda name, values: mixed(name, values).replace("F16", "F32"))
    moved(model := pissa.load(path, **FIELDS)).save_pretrained(tmp_path / "run")
    merge(tmp_path / "run", path, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    assert error(logits(merged, TOKENS), logits(model.eval(), TOKENS)) <= 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "</s>"
    init(path, tmp_path / "split", pissa.PissaConfig(**FIELDS))
    split = pissa.load(tmp_path / "split")
    assert error(logits(split.eval(), TOKENS), logits(twin, TOKENS)) <= 1e-5
