"""bench.experiments.evaluation.answers: prompts of conversations, and answers of a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny_model import save_tiny_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def test_prompts_are_alpaca_s() -> None:
    from bench.experiments.evaluation.answers import alpaca_prompt
    from pissa.cli.encode import ALPACA

    asked, answered = {"role": "user", "content": "Why {x}?"}, {"role": "assistant", "content": "So."}
    first = alpaca_prompt([asked])
    assert first == ALPACA.format(instruction="Why {x}?")
    assert alpaca_prompt([asked, answered, asked]) == (f"{first}So.\n\n### Instruction:\nWhy {{x}}?\n\n### Response:")


def test_a_batch_has_the_answers_of_its_prompts(tmp_path: Path) -> None:
    """In the order of the prompts, whatever their lengths, as transformers' own generation gives for each alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bench.experiments.evaluation.answers import answers

    folder = save_tiny_model(tmp_path, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_pretrained(folder, use_cache=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["a", "three words here", "bc", "a longer text, to be continued"]
    alone = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        alone.append(tokenizer.decode(found[0, ids.shape[1] :]))
    assert len(set(alone)) > 1
    assert answers(model, tokenizer, prompts, batch_size=3, max_new_tokens=6) == alone
    assert tokenizer.pad_token is None
