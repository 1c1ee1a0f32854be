"""Chat templates of well-known models: prompt and answer are cut where generation begins and ends."""

from __future__ import annotations

from typing import Any

import pytest

from chat_templates import DEEPSEEK_R1, GPT_OSS, MISTRAL, QWEN_3, TEMPLATES, Template, tokenizer_of
from pissa.cli.templates import Chat, check_continues, end_of_answer, prompt_and_answer, prompt_text
from pissa.cli.terminal import UserError

Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
EARLIER = [{"role": "user", "content": "H"}, {"role": "assistant", "content": "I"}]
SYSTEM = {"role": "system", "content": "S"}


def said(content: str) -> Chat:
    return Chat("f:1", [Q, {"role": "assistant", "content": content}])


@pytest.fixture(params=TEMPLATES)
def template(request: pytest.FixtureRequest) -> Template:
    return TEMPLATES[request.param]


@pytest.fixture
def tokenizer(template: Template) -> Any:
    return tokenizer_of(template)


def test_an_answer_is_learned_after_the_prompt_that_generation_gives(template: Template, tokenizer: Any) -> None:
    assert prompt_and_answer(Chat("", [Q, A]), tokenizer) == (template.prompt, template.answer)
    assert prompt_text([Q], tokenizer) == template.prompt


def test_generation_ends_at_the_token_that_is_learned_last(template: Template, tokenizer: Any) -> None:
    _, answer = prompt_and_answer(Chat("", [Q, A]), tokenizer)
    *inner, last = tokenizer(answer, add_special_tokens=False).input_ids
    assert {*tokenizer.convert_ids_to_tokens(end_of_answer(tokenizer))} == {*template.ends}
    assert last in end_of_answer(tokenizer)
    assert not {*inner} & {*end_of_answer(tokenizer)}  # generation does not end within an answer


def test_of_several_turns_the_last_answer_is_learned(template: Template, tokenizer: Any) -> None:
    assert prompt_and_answer(Chat("", [*EARLIER, Q, A]), tokenizer) == (template.turns, template.answer)


@pytest.mark.parametrize("text", ["{{ 1 / 0 }}", "{{ messages[9]['content'] }}", "{{ messages + 1 }}", "{% if %}"])
def test_a_template_that_fails_is_named(text: str) -> None:
    tokenizer = tokenizer_of(MISTRAL)
    tokenizer.chat_template = text
    with pytest.raises(UserError, match=r"^the tokenizer's chat template refuses: .*, or another template \[P110\]$"):
        prompt_text([Q], tokenizer)


def test_a_system_message_is_given_or_refused(template: Template, tokenizer: Any) -> None:
    if template.system is None:
        with pytest.raises(UserError, match=r"^f:3: .*template refuses: System role not supported; needed: "):
            prompt_and_answer(Chat("f:3", [SYSTEM, Q, A]), tokenizer)
    else:
        assert prompt_and_answer(Chat("", [SYSTEM, Q, A]), tokenizer) == (template.system, template.answer)


# ---- Thoughts ----


@pytest.mark.parametrize(
    ("template", "learned"), [(QWEN_3, "<think>\nT\n</think>\n\nA"), (DEEPSEEK_R1, "T\n</think>\n\nA")]
)
@pytest.mark.parametrize("content", ["<think>\nT\n</think>\n\nA", "<think>T</think>A"])
def test_thoughts_are_learned(content: str, template: Template, learned: str) -> None:
    prompt, answer = prompt_and_answer(said(content), tokenizer_of(template))
    assert (prompt, answer) == (template.prompt, learned + template.eos)


def test_without_thoughts_qwen_learns_what_both_of_its_prompts_ask_for() -> None:
    tokenizer = tokenizer_of(QWEN_3)
    no_thoughts = tokenizer.apply_chat_template([Q], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert "".join(prompt_and_answer(said("A"), tokenizer)) == no_thoughts + "A<|im_end|>"


def test_thoughts_that_a_template_takes_out_are_refused() -> None:
    tokenizer = tokenizer_of(MISTRAL)
    tokenizer.chat_template = MISTRAL.text.replace("' ' + m.content", "m.content.split('</think>')[-1]")
    with pytest.raises(UserError, match=r"^f:1: .* takes out what is before </think>, .*; take it out"):
        prompt_and_answer(said("<think>T</think>A"), tokenizer)


def test_harmonys_own_marks_in_an_answer_are_refused() -> None:
    with pytest.raises(UserError, match=r"^f:1: .*template refuses: You have passed a message containing <|channel|>"):
        prompt_and_answer(said("<|channel|>analysis<|message|>T"), tokenizer_of(GPT_OSS))


def test_preferences_are_refused_where_the_prompt_does_not_stay(template: Template, tokenizer: Any) -> None:
    """TRL cuts prompt and answers itself."""
    if template is DEEPSEEK_R1:
        with pytest.raises(UserError, match=r"^f:1: .*cannot be separated"):
            check_continues(said("A"), tokenizer)
    else:
        check_continues(said("A"), tokenizer)
