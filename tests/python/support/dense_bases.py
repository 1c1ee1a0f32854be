"""Small models in safetensors with tokenizers and adapters, of the kinds that are written as GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import pissa
from gguf_fixtures import MODELS, make
from oracle import change_all
from pissa.containers.gguf_metadata import WRITTEN
from pissa.containers.gguf_tokenizer import SAMPLE

KINDS = [kind for kind, (_, name, _) in MODELS.items() if f"{name}ForCausalLM" in WRITTEN]
SPECIAL = ["<pad>", "<s>", "</s>"]
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def tokenizer_of(splits: Any, size: int = 400) -> Any:
    """A byte-level tokenizer with merges, which splits texts so."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splits
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [SAMPLE] * 3, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return finished(backend)


def finished(backend: Tokenizer) -> Any:
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


def trained(kind: str, dtype: torch.dtype, tokenizer: Any, folder: Path, **fields: Any) -> tuple[Path, Path]:
    """A base of that architecture, with `fields` in its configuration, and an adapter for it."""
    size = len(tokenizer) + 3  # as of many models, some tokens are not used
    return adapted(make(kind, vocab_size=size, **fields).to(dtype), tokenizer, folder, "all-linear")


def trained_with_eyes(kind: str, tokenizer: Any, folder: Path, targets: str | list[str]) -> tuple[Path, Path]:
    """The same of a model that reads images, too."""
    text: Any = make(kind, vocab_size=len(tokenizer) + 3)
    made = getattr(transformers, f"{MODELS[kind][1]}ForConditionalGeneration")
    config = made.config_class(
        text_config=text.config.to_dict(),
        vision_config={"hidden_size": 32, "intermediate_size": 24, "patch_size": 4} | _EYES[kind],
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    model = made(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    return adapted(model, tokenizer, folder, targets)


_LAYER = {"num_hidden_layers": 1, "num_attention_heads": 2}
_EYES = {"gemma3": _LAYER | {"image_size": 16}, "gemma4": _LAYER | {"head_dim": 16, "num_key_value_heads": 2}}
_EYES["qwen3_5"] = {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}


def adapted(model: Any, tokenizer: Any, folder: Path, targets: str | list[str]) -> tuple[Path, Path]:
    """The model's folder and that of an adapter for it."""
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = pissa.load(folder / "base", r=4, target_modules=targets)
    change_all(model)
    model.save_pretrained(folder / "run")
    return folder / "base", folder / "run"
