"""The names and shapes of an adapter's tensors: which layers they are of, and the matrices in them."""

from __future__ import annotations

import json
import math
from pathlib import Path

from pissa.adapters.lora_folder import open_adapter

FILE, HEADER = "adapter_model.safetensors", 8
LORA = {"peft_type": "LORA", "r": 2, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def parse(folder: Path) -> None:
    config = folder / "adapter_config.json"
    if not config.exists():
        config.write_text(json.dumps(LORA))
    lora = open_adapter(folder)
    for target, factors in lora.factors.items():
        for a, b in lora.matrices(target):
            assert a.shape == (factors.rank, math.prod(factors.row))
            assert b.shape == (factors.out, factors.rank)
