"""adapter_config.json: of a plain LoRA, and a PissaConfig alone."""

from __future__ import annotations

from pathlib import Path

from pissa.adapters.lora_folder import PLAIN_LORA, read_lora_config, size_of
from pissa.adapters.pissa_layout import read_config
from pissa.containers.messages import file_errors

FILE = "adapter_config.json"


def parse(folder: Path) -> None:
    refused = None
    patterns = {name: {} for name in ("rank_pattern", "alpha_pattern")}  # one may match for hours: PEFT's do
    try:
        config = read_lora_config(folder / FILE)
        with file_errors(folder / FILE, PLAIN_LORA):
            size_of(config | patterns, "model.layers.0.self_attn.q_proj")
    except ValueError as error:
        refused = error
    try:
        read_config(folder)
    except ValueError:
        if refused is not None:
            raise refused from None
