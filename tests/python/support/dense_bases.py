"""Small models in safetensors with tokenizers and adapters, of the kinds that are written as GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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
    model: Any = make(kind, vocab_size=size, **fields).to(dtype)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = pissa.load(folder / "base", r=4, target_modules="all-linear")
    change_all(adapted)
    adapted.save_pretrained(folder / "run")
    return folder / "base", folder / "run"
