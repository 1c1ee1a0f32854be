"""The table of architectures. `python tests/python/support/matrix.py` writes it anew.

A cell is what pytest collects: "tested", "refused" or "no" if all of its tests are there and none is marked to be
skipped, else "-".
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import architecture_checks as checks
from architectures import ARCHITECTURES, FORMS

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "architectures.md"
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
FILES = (
    "model/test_architectures.py",
    "trainers/test_dpo_architectures.py",
    "processes/test_parallel_architectures.py",
)
ALONE = {
    "wrap": {checks.check_start, checks.check_step_0, checks.check_disable_and_delete},
    "train": {checks.check_gradients, checks.check_training_step},
    "save, reload": {checks.check_save_and_reload},
    "merge": {checks.check_merge},
}
"""The checks of the columns for one process; in 4 bits all of them are those of the column nf4."""
COLUMNS = ("wrap", "nf4", "train", "save, reload", "merge", "DPO", "DDP", "FSDP2")
NO = {(name, "FSDP2"): "FSDP does not support non-contiguous parameters yet" for name in ("gpt_oss", "llama4")}
# TRL asks for the model below the head, which transformers does not find in its Llama4ForCausalLM.
NO["llama4", "DPO"] = "has no attribute 'last_hidden_state'"
"""What does not work with a dense base, and words of the error."""


def is_refused(name: str, column: str) -> bool:
    return column == "nf4" and ARCHITECTURES[name].nf4_refused is not None


def tests_of(name: str, column: str) -> set[str]:
    """The tests of a cell, as pytest calls them."""
    if is_refused(name, column):
        return {f"test_four_bits_are_refused_by_the_layers_name[{name}]"}
    if column == "DPO":
        return {f"test_a_step_of_dpo[{name}]"}
    if column in ("DDP", "FSDP2"):
        return {f"test_a_step_of_two_processes_is_that_of_one[{name}-{form}-{column}]" for form in FORMS}
    if column == "nf4":
        assert set().union(*ALONE.values()) == set(checks.LIFE)
        return {f"test_its_life[{name}-nf4]"}
    assert ALONE[column] <= set(checks.LIFE)
    return {f"test_its_life[{name}-implicit]"}


@cache
def collected() -> set[str]:
    """The tests that run."""
    run = "not (slow or gpu or skip or skipif or xfail)"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", run]
    files = [f"tests/python/{file}" for file in FILES]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=True)
    return {line.partition("::")[2] for line in done.stdout.splitlines()}


def cell(name: str, column: str) -> str:
    if not tests_of(name, column) <= collected():
        return "-"
    if is_refused(name, column):
        return "refused"
    return "no" if (name, column) in NO else "tested"


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
