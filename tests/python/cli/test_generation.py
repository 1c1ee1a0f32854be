"""Answers in batches: those of one prompt at a time, for every kind of model, in the order of the prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

import pissa
from architectures import ARCHITECTURES, DAILY
from daily import each
from language_models import moved
from pissa.cli import generation
from pissa.cli.generation import generate, generate_many, repeats_itself

CAUSAL = [name for name, architecture in ARCHITECTURES.items() if architecture.is_causal]
TOKENIZER = SimpleNamespace(pad_token_id=None)
PROMPTS = [
    torch.randint(3, 89, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (3, 9, 5, 12, 5, 3)
]


@pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning")
@pytest.mark.parametrize("name", each(CAUSAL, (*DAILY, "deepseek_v4")))
def test_answers_in_batches_are_those_of_one_prompt_at_a_time(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model: Any = moved(pissa.wrap(architecture.make(), **architecture.config())).eval()
    alone = [generate(model, TOKENIZER, prompt, 12, [], do_sample=False) for prompt in PROMPTS]
    ends = [alone[3][5], alone[1][8]]  # some answers of a batch end before the others
    for stops in ([], ends):
        expected = [generate(model, TOKENIZER, prompt, 12, stops, do_sample=False) for prompt in PROMPTS]
        assert [*generate_many(model, TOKENIZER, PROMPTS, 12, stops)] == expected
    assert len({*map(len, expected)}) > 1


def test_a_repetition_penalty_does_not_see_padding(tiny_llama: Any) -> None:
    # `generate` tells its own what is padding, but not before transformers 5.23.
    model, options = tiny_llama(), {"do_sample": False, "logits_processor": [RepetitionPenaltyLogitsProcessor(10.0)]}
    expected = [generate(model, TOKENIZER, prompt, 12, [], **options) for prompt in PROMPTS]
    likely = expected[0][0]  # of the shortest prompt; as padding, it would be unlikely
    assert likely not in PROMPTS[0]
    assert [*generate_many(model, SimpleNamespace(pad_token_id=likely), PROMPTS, 12, [], **options)] == expected


@pytest.mark.parametrize("limit", ["_ROWS", "_TOKENS"])
def test_batches_are_limited(limit: str, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, limit, {"_ROWS": 2, "_TOKENS": 40}[limit])
    model, sizes = tiny_llama(), []
    real = model.generate

    def watched(**options: Any) -> Any:
        if options["max_new_tokens"] == 8:
            sizes.append(options["input_ids"].shape)
        return real(**options)

    monkeypatch.setattr(model, "generate", watched)
    expected = [generate(model, TOKENIZER, prompt, 8, [], do_sample=False) for prompt in PROMPTS]
    sizes.clear()
    assert [*generate_many(model, TOKENIZER, PROMPTS, 8, [])] == expected
    assert [*map(tuple, sizes)] == {
        "_ROWS": [(2, 12), (2, 5), (2, 3)],
        "_TOKENS": [(2, 12), (3, 5), (1, 3)],
    }[limit]


def test_a_prompt_that_fills_the_context_is_answered_as_alone(tiny_llama: Any) -> None:
    model = tiny_llama(max_position_embeddings=16)
    expected = [generate(model, TOKENIZER, prompt, 8, [], do_sample=False) for prompt in PROMPTS]
    assert [*map(len, expected)] == [8, 7, 8, 4, 8, 8]
    assert [*generate_many(model, TOKENIZER, PROMPTS, 8, [])] == expected


def test_no_prompts_have_no_answers(tiny_llama: Any) -> None:
    assert [*generate_many(tiny_llama(), TOKENIZER, [], 8, [])] == []


class _Bytes:
    """A token for each byte."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode()


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("It is late. " * 12, True),
        ("ha" * 80, True),
        ("!" * 300, True),
        ("It is late. " * 5, False),
        ("".join(f"{i} x 7 = {7 * i}\n" for i in range(40)), False),
        ("0 0 0\n" * 20, False),
        ("-" * 200, False),
    ],
)
def test_an_answer_ends_that_repeats_one_text_over_and_over(text: str, stops: bool) -> None:
    assert repeats_itself(list(text.encode()), _Bytes()) is stops
