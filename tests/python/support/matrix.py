"""The table of architectures. `python tests/python/support/matrix.py` writes it anew.

Every cell is a test of each architecture, which holds what the cell says: `test_architectures.py`, and, of several
processes, `test_parallel_architectures.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from architectures import ARCHITECTURES

PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"
BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"

TITLES = {
    "llama2": "Llama 2",
    "llama3": "Llama 3",
    "mistral": "Mistral",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "yi": "Yi",
    "phi3": "Phi-3",
    "mixtral": "Mixtral",
    "mixtral, experts of linear layers": "Mixtral, experts as linear layers",
    "deepseek_v2": "DeepSeek-V2, MoE",
    "deepseek_v3": "DeepSeek-V3, MoE",
    "gpt_oss": "GPT-OSS",
    "gemma3": "Gemma 3",
    "qwen3_moe": "Qwen3-MoE",
    "olmoe": "OLMoE",
    "llama4": "Llama 4, MoE",
    "mamba": "Mamba",
    "mamba2": "Mamba 2",
    "qwen2_5_vl": "Qwen2.5-VL, with an image",
    "gemma3, vision-language": "Gemma 3, with an image",
    "whisper": "Whisper",
    "falcon": "Falcon",
    "gpt2": "GPT-2",
    "llama, embeddings targeted": "Llama, embeddings targeted",
    "t5": "T5",
    "bart": "BART",
    "roberta": "RoBERTa, classifier",
    "deberta_v3": "DeBERTa-v3, classifier",
    "modernbert": "ModernBERT, classifier",
    "vit": "ViT",
    "vit, patches targeted": "ViT, patch convolution targeted",
    "resnet": "ResNet",
}
COLUMNS = ("wrap", "nf4", "train", "save, reload", "merge", "DPO", "DDP", "FSDP2")
NO = {(name, "FSDP2"): "FSDP does not support non-contiguous parameters yet" for name in ("gpt_oss", "llama4")}
# TRL asks for the model below the head, which transformers does not find in its Llama4ForCausalLM.
NO["llama4", "DPO"] = "has no attribute 'last_hidden_state'"
"""What does not work with a dense base, and words of the error."""


def cell(name: str, column: str) -> str:
    architecture = ARCHITECTURES[name]
    if column == "nf4" and architecture.nf4_refused is not None:
        return "refused"
    if column == "DPO" and not architecture.is_causal:
        return "-"
    return "no" if (name, column) in NO else "pass"


def lines() -> Iterator[str]:
    yield f"| architecture | {' | '.join(COLUMNS)} |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for name, architecture in ARCHITECTURES.items():
        star = "\\*" if architecture.paper else ""
        yield f"| {TITLES[name]}{star} | {' | '.join(cell(name, column) for column in COLUMNS)} |"


def table() -> str:
    """The table, between its marks."""
    return "\n".join([BEGIN, "", *lines(), "", END])


def written() -> str:
    """The table in docs/architectures.md, between its marks."""
    found = re.search(f"{re.escape(BEGIN)}.*{re.escape(END)}", PAGE.read_text(), flags=re.DOTALL)
    assert found, f"{PAGE} has no {BEGIN} ... {END}"
    return found[0]


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().replace(written(), table()))
