"""adapter_config.json: of a plain LoRA, and a PissaConfig alone."""

from __future__ import annotations

from pathlib import Path

from pissa.files.config_json import read_config_alone
from pissa.files.lora_config import read_lora_config, size_of

FILE = "adapter_config.json"


def parse(folder: Path) -> None:
    refused = None
    try:
        config = read_lora_config(folder / FILE)
    except ValueError as error:
        refused = error
    else:
        patterns = {name: {} for name in ("rank_pattern", "alpha_pattern")}  # one may match for hours: PEFT's do
        size_of(config | patterns, "model.layers.0.self_attn.q_proj")
    if read_config_alone(folder / FILE) is None and refused is not None:
        raise refused
