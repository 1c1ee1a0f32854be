"""What `pissa finetune` has trained says the same after `pissa merge`, to users who have only transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import pissa
from language_models import error
from lora_files import CLOSE
from pissa.cli import main
from runs import command

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


def answer(model: nn.Module, folder: Path) -> tuple[list[int], Tensor]:
    """The tokens of a greedy answer, and the logits of each, with the tokenizer in the folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "17+1"}]
    tokens = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**tokens, **options)
    return found.sequences[0].tolist(), torch.cat(found.logits)


@pytest.mark.parametrize("quant", [[], ["--quant", "nf4"]], ids=["dense", "nf4"])
def test_the_merged_model_says_what_the_adapter_says(quant: list[str], base: Path, data: Path, tmp_path: Path) -> None:
    assert main(command("finetune", base, data, tmp_path / "run", "--rank", "4", *quant)) == 0
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged"), "--base", str(base)]) == 0
    unmodified = AutoModelForCausalLM.from_pretrained(base)
    before, _ = answer(unmodified, base)
    tokens, expected = answer(pissa.PissaModel.from_pretrained(unmodified, tmp_path / "run"), base)
    assert tokens != before
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    found, logits = answer(merged, tmp_path / "merged")
    assert found == tokens
    assert error(logits, expected) < CLOSE
