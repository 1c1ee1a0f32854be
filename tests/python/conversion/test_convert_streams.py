"""Conversion holds one layer at a time, of the adapter and of the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pissa
from architectures import ARCHITECTURES
from language_models import Make
from live_bytes import LiveBytes
from lora_files import NAMES
from peft_adapters import Trained, train_on_residual, train_pissa
from pissa import notices
from pissa.conversion import plain_lora

OUT, IN, RANK = 96, 160, 8
TARGET = 8 * RANK * (OUT + IN)
"""The factors of one layer in float64."""


def save_lora(folder: Path, layers: int, **fields: object) -> Path:
    """A plain LoRA of so many equal layers, and biases beside them."""
    generator = torch.Generator().manual_seed(layers)
    tensors = {}
    for index in range(layers):
        place = f"base_model.model.layers.{index}"
        tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, IN, generator=generator)
        tensors[f"{place}.lora_B.weight"] = torch.randn(OUT, RANK, generator=generator)
        tensors[f"{place}.bias"] = torch.randn(OUT, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / NAMES[1])
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["layers"], "bias": "lora_only"}
    (folder / NAMES[0]).write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize("layout", ["rank", "initial", "subtracted"])
def test_memory_does_not_grow_with_the_number_of_layers(layout: str, tmp_path: Path) -> None:
    peaks = []
    for layers in (3, 24):
        source = save_lora(tmp_path / str(layers) / "adapter", layers)
        options: dict[str, object] = {"rank": 3} if layout == "rank" else {}
        if layout == "initial":
            options = {"initial": save_lora(tmp_path / str(layers) / "initial", layers)}
        elif layout == "subtracted":
            options = {"subtracted": True}
        with LiveBytes() as memory:
            pissa.convert(source, tmp_path / str(layers) / "lora", **options)
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1]
    # Factors, their QR and singular value decompositions, what is kept and what is left out, and eight random inputs;
    # factors with a start have twice the rank.
    assert peaks[1] <= (24 if layout == "initial" else 12) * TARGET


@pytest.fixture
def folder(tiny_llama: Make, tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="40KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    return tmp_path / "base"


def same(first: Path, second: Path) -> bool:
    tensors, others = (load_file(folder / NAMES[1]) for folder in (first, second))
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def refuse_to_load(*_: object) -> nn.Module:
    raise AssertionError("the model is loaded as a whole")


def test_a_base_in_a_folder_is_read_layer_by_layer(
    folder: Path, tiny_llama: Make, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train_pissa(tiny_llama(), tokens, tmp_path, target_modules=["q_proj", "down_proj", "lm_head"])
    pissa.convert(trained.adapter, tmp_path / "memory", base=tiny_llama())
    monkeypatch.setattr(plain_lora, "load_base", refuse_to_load)
    with LiveBytes() as memory:
        pissa.convert(trained.adapter, tmp_path / "lora", base=folder)
    assert same(tmp_path / "memory", tmp_path / "lora")
    # The weight, the three matrices of its decomposition and factors of rank 4, 2 x 4 of them in float64
    largest = max(parameter.nbytes for parameter in tiny_llama().parameters())
    assert memory.peak <= 10 * largest


@pytest.mark.parametrize(
    ("name", "targets"),
    [("gpt2", ["c_attn", "c_proj", "wte"]), ("mixtral", ["q_proj", "o_proj"]), ("phi3", ["qkv_proj", "gate_up_proj"])],
)
def test_names_and_layouts_of_other_models(
    name: str, targets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conv1D's weights lie transposed, an embedding may be tied, and files may have other names than the model."""
    architecture = ARCHITECTURES[name]
    base = architecture.make()
    base.save_pretrained(tmp_path / "base")
    tokens = architecture.batch()["input_ids"]
    trained = train_pissa(base, tokens, tmp_path, target_modules=targets, fan_in_fan_out=name == "gpt2")
    pissa.convert(trained.adapter, tmp_path / "memory", base=type(base).from_pretrained(tmp_path / "base"))
    monkeypatch.setattr(plain_lora, "load_base", refuse_to_load)
    pissa.convert(trained.adapter, tmp_path / "lora", base=tmp_path / "base")
    assert same(tmp_path / "memory", tmp_path / "lora")


def test_a_residual_model_is_compared_layer_by_layer(
    folder: Path, tiny_llama: Make, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train_on_residual(tiny_llama, tokens, tmp_path)
    monkeypatch.setattr(plain_lora, "load_base", refuse_to_load)
    pissa.convert(trained.adapter, tmp_path / "lora", initial=trained.initial, base=folder)
    shard, name = next(
        (path, name) for path in sorted(folder.glob("*.safetensors")) for name in load_file(path) if "_proj" in name
    )
    tensors = load_file(shard)
    tensors[name][1, 2] += 1e-3
    save_file(tensors, shard, {"format": "pt"})
    layer = name.removesuffix(".weight").replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"do not add up to the base: in layer {layer} they differ by 0\.001"):
        pissa.convert(trained.adapter, tmp_path / "other", initial=trained.initial, base=folder)


@pytest.fixture
def trained(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> Trained:
    return train_pissa(tiny_llama(), tokens, tmp_path, target_modules=["q_proj"])


def test_a_model_that_cannot_be_read_by_layers_is_loaded_and_it_says_why(
    folder: Path, trained: Trained, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    rounds = r"holds torch\.float32, which .* rounds to torch\.bfloat16"
    with pytest.warns(notices.WholeModelWarning, match=rounds) as caught:
        pissa.convert(trained.adapter, tmp_path / "rounded", base=folder)
    assert caught[0].filename == __file__
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.warns(notices.WholeModelWarning, match="cannot be read one by one: .*pytorch_model.bin"):
        pissa.convert(trained.adapter, tmp_path / "lora", base=folder)
    assert (tmp_path / "lora" / NAMES[1]).is_file()
