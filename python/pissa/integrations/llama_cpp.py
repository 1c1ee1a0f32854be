"""Compares llama.cpp, through its Python binding, with the model that was trained: the same file, the same tokens?"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pissa.adapters.lora_folder import open_adapter
from pissa.checkpoints.load import load
from pissa.containers.checkpoint import ModelFolder
from pissa.containers.hub import Name

PROMPTS = ("The three most important things to know about the sea are", "def quicksort(numbers):\n", "2 + 3 =")
TOKENS = 32
"""The number of tokens that continue each prompt."""


class Compared(NamedTuple):
    """How far llama.cpp continues a prompt as the trained model does, both taking the likeliest token."""

    prompt: str
    equal: int
    """The number of equal tokens before the first that differs."""
    gap: float | None
    """The difference of the two largest logits of the trained model where a token differs; None if none does."""


def compare(adapter: Path | None, base: Name | None, lora: Path | None) -> list[Compared]:
    """Continues `PROMPTS` with llama.cpp, which runs the GGUF file `base` with the exported `lora`, and with the
    adapter on that file; without both, with the file alone. llama.cpp rounds activations, so tokens differ where two
    are nearly equally likely.

    Raises:
        ModuleNotFoundError: llama-cpp-python is not installed.
        ValueError: as for `pissa.load`.
    """
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        how = "run `pip install llama-cpp-python`, which compiles it"
        raise ModuleNotFoundError(f"the comparison needs llama.cpp's Python binding: {how}", name=error.name) from error
    source = ModelFolder.open(base or (adapter and open_adapter(adapter).named_base) or "")
    # An adapter that starts as LoRA changes nothing.
    fields: dict[str, Any] = {"r": 1, "init": "lora"} if adapter is None else {"adapter": adapter}
    model: Any = load(source.folder, is_trainable=False, dtype=torch.float32, **fields)
    model.generation_config.eos_token_id = None
    tokenizer = source.tokenizer()
    llama = llama_cpp.Llama(str(source.folder), lora_path=lora and str(lora), n_ctx=256, verbose=False)
    compared = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        options = {"do_sample": False, "max_new_tokens": TOKENS, "output_logits": True, "return_dict_in_generate": True}
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        ours = found.sequences[0, ids.shape[1] :].tolist()
        llama.reset()
        theirs = islice(llama.generate(ids[0].tolist(), top_k=1), TOKENS)
        same = [mine == other for mine, other in zip(ours, theirs, strict=True)]
        equal = same.index(False) if False in same else TOKENS
        first, second = found.logits[min(equal, TOKENS - 1)][0].topk(2).values.tolist()
        compared.append(Compared(prompt, equal, None if equal == TOKENS else first - second))
    return compared
