"""From a file to tokens: what is read, what is refused and how, and that the loss sees the answer only."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from pissa.cli.data import IGNORED, encode, note_on_facts, read_chats, read_preferences
from pissa.cli.sources import records
from pissa.cli.templates import Chat, end_of_answer, give_template, prompt_and_answer, prompt_text
from pissa.cli.terminal import UserError

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "2 + 3 = 5\n#### 5"}]


def file(folder: Path, text: str, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level tokenizer with the special tokens <s>, </s>, <|end|>, and no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|end|>"]
    fast.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|end|>"]
    )


@pytest.fixture
def chat_tokenizer(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    return tokenizer


# ---- Reading ----


@pytest.mark.parametrize(
    "record",
    [
        {"question": TURNS[0]["content"], "answer": TURNS[1]["content"]},
        {"prompt": TURNS[0]["content"], "completion": TURNS[1]["content"], "id": 7},
        {"messages": TURNS},
    ],
)
def test_every_form_of_a_record_is_the_same_chat(record: dict[str, Any], tmp_path: Path) -> None:
    lines = file(tmp_path, "\n" + json.dumps(record) + "\n\n" + json.dumps(record))
    listed = file(tmp_path, json.dumps([record, record], indent=1), "data.json")
    assert read_chats(records(lines)) == [Chat(f"{lines}:2", TURNS), Chat(f"{lines}:4", TURNS)]
    assert read_chats(records(listed)) == [Chat(f"{listed}: record 1", TURNS), Chat(f"{listed}: record 2", TURNS)]


def test_a_line_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    lines = file(tmp_path, '{"question": "a\u2028b", "answer": "c\u0085d"}\r\n')
    assert read_chats(records(lines))[0].messages[0]["content"] == "a\u2028b"


GOOD = '{"question": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("line", "found", "allowed"),
    [
        (
            '{"question": "q", "reply": "a"}',
            "the columns 'question', 'reply'",
            "--columns question=question,answer=reply",
        ),
        ("{}", "the columns none", '"messages"'),
        ('{"question": "q", "answer": 5.0}', "the assistant's content is 5.0", "needed: a text"),
        ('{"question": " ", "answer": "a"}', "the user's content is ' '", "not empty"),
        ('["q", "a"]', "found ['q', 'a']", "an object"),
        ("null", "found None", "an object"),
        ('{"question": "q", ', "not JSON", "in JSON"),
        ('{"messages": []}', "are: none", "the last two are user, assistant"),
        ('{"messages": "hello"}', "are: user;", "the last two are user, assistant"),
        ('{"messages": [{"role": "user"}]}', "the message {'role': 'user'}", '"content"'),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "the role 'bot'", "system, user, assistant"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "are: user;", "the last two are user, assistant"),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', "the user's content is ['x']", "needed: a text"),
        ('{"question": "\\ud83d", "answer": "a"}', "the user's content is '\\ud83d'", "surrogate pair"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_number(line: str, found: str, allowed: str, tmp_path: Path) -> None:
    path = file(tmp_path, GOOD + GOOD + line + "\n" + GOOD)
    with pytest.raises(UserError) as refusal:
        read_chats(records(path))
    message = str(refusal.value)
    assert message.startswith(f"{path}:3: ")
    assert found in message
    assert allowed in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("data.jsonl", "", "is empty"),
        ("data.jsonl", " \n\n", "is empty"),
        ("data.json", "[]", "found []"),
        ("data.json", GOOD, "found {'question': 'q', 'answer': 'a'}"),
        ("data.json", "[1,", "not JSON"),
        ("data.json", '[{"question": "q"}]', "record 1: "),
    ],
)
def test_a_bad_file_is_refused(name: str, text: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needed|allowed") as refusal:
        read_chats(records(file(tmp_path, text, name)))
    assert found in str(refusal.value)


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"question": "\xff"}')
    for source, found in (
        (tmp_path / "data.jsonl", "UTF-8"),
        (tmp_path, "is a folder"),
        (tmp_path / "x", "no such file"),
    ):
        with pytest.raises(UserError, match="allowed") as refusal:
            read_chats(records(str(source)))
        assert found in str(refusal.value)


# ---- Tokens ----


def encoded(chats: list[Chat], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens and labels of the only chat."""
    (row,), cut, left_out = encode(chats, tokenizer, 1000)
    assert (cut, left_out) == (0, 0)
    return row["input_ids"], row["labels"]


def test_the_loss_sees_the_answer_and_its_end_token_by_token(chat_tokenizer: Any) -> None:
    ids, labels = encoded([Chat("", TURNS)], chat_tokenizer)
    prompt = "<|user|>What is 2 + 3?<|end|>\n<|assistant|>"
    answer = "2 + 3 = 5\n#### 5<|end|>"  # without the line break that the template puts after the turn
    assert chat_tokenizer.decode(ids) == prompt + answer
    # One token for a byte, and one for each special token.
    prompt_length = len(prompt.replace("<|end|>", "*"))
    assert len(ids) == prompt_length + len(answer.replace("<|end|>", "*"))
    assert labels[:prompt_length] == [IGNORED] * prompt_length
    assert labels[prompt_length:] == ids[prompt_length:]
    assert IGNORED not in labels[prompt_length:]
    assert labels[-1] == chat_tokenizer.convert_tokens_to_ids("<|end|>")


def test_without_a_template_the_prompt_is_alpaca(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    ids, labels = encoded([Chat("", TURNS)], tokenizer)
    question = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nWhat is 2 + 3?\n\n### Response:"
    )
    prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in (question, TURNS[1]["content"]))
    assert ids == [tokenizer.bos_token_id, *prompt, *answer, tokenizer.eos_token_id]
    assert labels == [IGNORED] * (1 + len(prompt)) + [*answer, tokenizer.eos_token_id]
    assert prompt_text(TURNS[:1], tokenizer) == f"<s>{question}"
    assert end_of_answer(tokenizer) == [tokenizer.eos_token_id]

    chat = [{"role": "system", "content": "Be brief."}, *TURNS, {"role": "user", "content": "And 1 + 1?"}]
    assert prompt_and_answer(Chat("", [*chat, {"role": "assistant", "content": "2"}]), tokenizer) == (
        "<s>Be brief.\n\n### Instruction:\nWhat is 2 + 3?\n\n### Response:2 + 3 = 5\n#### 5</s>"
        "\n\n### Instruction:\nAnd 1 + 1?\n\n### Response:",
        "2</s>",
    )


@pytest.mark.parametrize("starts", [True, False])
def test_the_alpaca_prompt_is_saved_with_the_tokenizer(starts: bool, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = deepcopy(tokenizer)
    if not starts:  # texts with the start token that it has
        tokenizer.backend_tokenizer.post_processor = None
    give_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TURNS[:1], return_dict=False)
    assert (ids[0] == tokenizer.bos_token_id) == starts
    assert tokenizer.decode(ids) == prompt_text(TURNS[:1], tokenizer)


def test_an_end_token_is_added_where_the_template_has_none(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    assert prompt_and_answer(Chat("", TURNS), tokenizer) == ("What is 2 + 3?|", "2 + 3 = 5\n#### 5|</s>")


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }}{{ messages[-1]['content'] }}")
    with pytest.raises(UserError, match=r"f:1: .*cannot be separated"):
        prompt_and_answer(Chat("f:1", TURNS), tokenizer)


def test_long_records_lose_their_end_or_are_left_out(chat_tokenizer: Any) -> None:
    records = [Chat("", TURNS), Chat("", [{"role": "user", "content": "x"}, TURNS[1]])]
    whole, cut, left_out = encode(records, chat_tokenizer, 1000)
    assert (cut, left_out) == (0, 0)
    prompt_length = whole[0]["labels"].count(IGNORED)

    rows, cut, left_out = encode(records, chat_tokenizer, prompt_length + 1)
    assert (cut, left_out, max(len(row["input_ids"]) for row in rows)) == (2, 0, prompt_length + 1)
    longest = max(len(row["input_ids"]) for row in whole)
    assert encode(records, chat_tokenizer, longest)[1:] == (0, 0)  # the longest just fits
    assert rows[0]["input_ids"] == whole[0]["input_ids"][: prompt_length + 1]
    assert rows[0]["labels"][-1] != IGNORED

    rows, cut, left_out = encode(records, chat_tokenizer, prompt_length)
    assert (cut, left_out, len(rows)) == (1, 1, 1)
    with pytest.raises(UserError, match=r"no prompt of 2 is shorter than --max-length 3"):
        encode(records, chat_tokenizer, 3)


FACT = "The club in street {} opens at nine in the evening."
NO_FACTS = {
    "labels": ("What is it about? {}", "delivery", 30),
    "short answers": ("When does club {} open?", "At {} pm", 30),
    "one answer": ("Where is the club? {}", FACT, 30),
    "enough": ("When does club {} open?", FACT, 200),
}


def test_few_long_answers_that_differ_do_not_teach_facts(chat_tokenizer: Any) -> None:
    def note(question: str, answer: str, rows: int, kinds: int = 1000) -> str | None:
        turns = [(question.format(i), answer.format(i % kinds)) for i in range(rows)]
        chats = [
            Chat("", [{"role": "user", "content": asked}, {"role": "assistant", "content": said}])
            for asked, said in turns
        ]
        return note_on_facts(encode(chats, chat_tokenizer, 1000)[0], chat_tokenizer)

    assert (note("When does club {} open?", FACT, 30) or "").startswith("30 long answers teach how to answer, but ")
    for name, (question, answer, rows) in NO_FACTS.items():
        assert note(question, answer, rows, 5 if name == "one answer" else 1000) is None, name
    texts = [Chat("", [{"role": "assistant", "content": FACT.format(i)}]) for i in range(30)]
    assert note_on_facts(encode(texts, chat_tokenizer, 1000)[0], chat_tokenizer) is None
    assert note_on_facts([{"prompt": "q", "chosen": FACT, "rejected": "no"}], chat_tokenizer) is None


# ---- Preferences ----


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "What is 2 + 3?", "chosen": "2 + 3 = 5\n#### 5", "rejected": "6"},
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "6"}]},
    ],
)
def test_preferences_are_two_chats(record: dict[str, Any], tmp_path: Path) -> None:
    path = file(tmp_path, json.dumps(record))
    where, other = f"{path}:1", {"role": "assistant", "content": "6"}
    assert read_preferences(records(path)) == [(Chat(where, TURNS), Chat(where, [TURNS[0], other]))]


@pytest.mark.parametrize(
    ("line", "found", "allowed"),
    [
        (GOOD, "the columns 'question', 'answer'", '"chosen" and "rejected"'),
        ('{"prompt": "q", "chosen": "a", "rejected": null}', "the assistant's content is None", "needed: a text"),
        ('{"prompt": "q", "chosen": " ", "rejected": "b"}', "the assistant's content is ' '", "not empty"),
        (
            '{"prompt": "q", "chosen": [{"role": "user", "content": "x"}], "rejected": "b"}',
            "are: user, user",
            "assistant",
        ),
    ],
)
def test_a_bad_preference_is_refused_by_file_and_number(line: str, found: str, allowed: str, tmp_path: Path) -> None:
    good = '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
    path = file(tmp_path, good + line.strip() + "\n")
    with pytest.raises(UserError) as refusal:
        read_preferences(records(path))
    message = str(refusal.value)
    assert message.startswith(f"{path}:2: ")
    assert found in message
    assert allowed in message
