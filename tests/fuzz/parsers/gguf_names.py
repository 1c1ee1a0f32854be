"""The names of an adapter's tensors: which layers they are of, and what llama.cpp calls these."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import LlamaConfig

from pissa.adapters.lora_folder import open_adapter
from pissa.integrations import gguf

FILE, HEADER = "adapter_model.safetensors", 8
LORA = {"peft_type": "LORA", "r": 2, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
LLAMA = LlamaConfig(num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1)


def parse(folder: Path) -> None:
    config = folder / "adapter_config.json"
    if not config.exists():
        config.write_text(json.dumps(LORA))
    lora = open_adapter(folder)
    _, places = gguf._places("LlamaForCausalLM", LLAMA, lora)
    for target, factors in lora.factors.items():
        (pair,) = lora.matrices(target)
        a, b = gguf._arrange(factors, places[target][1], *pair)
        assert (a.mT if factors.is_embedding else a).shape == (factors.rank, *factors.row)
        assert b.shape == (factors.out, factors.rank)
