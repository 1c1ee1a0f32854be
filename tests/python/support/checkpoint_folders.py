"""Small checkpoints of many architectures, as transformers writes them, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mixtures
from mapped_files import read_tensors

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}


def llama(**fields: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES | HEADS | fields))


def qwen2() -> nn.Module:
    """With biases, and an output layer that is tied to the embedding."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    """Of Conv1D, whose weights are [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64))


def llava() -> nn.Module:
    """Whose tensors transformers renames as it loads them."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(**SIZES, **HEADS)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "llava": llava,
    **mixtures.KINDS,
}


def save(
    kind: str, folder: Path, dtype: torch.dtype = torch.float32, *, shards: str = "5GB", **fields: Any
) -> nn.Module:
    """Writes a random model of that kind, and returns it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = KINDS[kind](**fields).to(dtype).eval()
        with torch.no_grad():  # biases too, and experts of different sizes
            for parameter in model.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder, max_shard_size=shards)
    return model


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Writes model.safetensors anew with what `change` makes of its tensors."""
    path = folder / "model.safetensors"
    save_file({name: value.contiguous() for name, value in change(read_tensors(path)).items()}, path, {"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    """Changes fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All of a checkpoint, sharded or not."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
