"""Data as people have it: files of every kind, forms of well-known data sets, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from pissa.cli.data import encode, read_chats, read_preferences, shown
from pissa.cli.sources import is_records, records
from pissa.cli.templates import Chat, end_of_answer
from pissa.cli.terminal import UserError, columns
from tiny_model import tiny_tokenizer

Q, A = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def written(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_text(text, encoding=encoding, newline="")
    return str(path)


def chats(source: str, names: str | None = None) -> list[list[dict[str, str]]]:
    return [chat.messages for chat in read_chats(records(source, names and columns(names)))]


# ---- Forms: a record as each data set has it ----

FORMS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "tatsu-lab/alpaca": (
        {"instruction": "Sort.", "input": "3, 1", "output": "1, 3", "text": "Below is an instruction ..."},
        turns("Sort.\n\n3, 1", "1, 3"),
    ),
    "alpaca, no input": ({"instruction": "1+1?", "input": "", "output": "2"}, [Q, A]),
    "alpaca, no value": ({"instruction": "1+1?", "input": None, "output": "2"}, [Q, A]),
    "alpaca, nan": ({"instruction": "1+1?", "input": float("nan"), "output": "2"}, [Q, A]),
    "anon8231489123/ShareGPT": (
        {
            "id": "a1",
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "1+1?"},
                {"from": "gpt", "value": "2", "weight": 1},
                {"from": "user", "value": "1+2?"},
                {"from": "assistant", "value": "3"},
            ],
        },
        [{"role": "system", "content": "S"}, *turns("1+1?", "2", "1+2?", "3")],
    ),
    "HuggingFaceH4/no_robots": (
        {"prompt": "1+1?", "prompt_id": "x", "messages": [Q, A], "category": "Open QA"},
        [Q, A],
    ),
    "conversations of roles": ({"conversations": [Q, A]}, [Q, A]),
    "openai/gsm8k": ({"question": "1+1?", "answer": "2"}, [Q, A]),
    "a number": ({"question": "1+1?", "answer": 2}, [Q, A]),
    "trl-lib/tldr": ({"prompt": "1+1?", "completion": "2"}, [Q, A]),
    "stanfordnlp/imdb": ({"text": "A film.", "label": 0}, [{"role": "assistant", "content": "A film."}]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read(name: str, tmp_path: Path) -> None:
    record, messages = FORMS[name]
    assert chats(written(tmp_path / "data.jsonl", json.dumps(record))) == [messages]
    assert read_chats(records("set", rows=[record])) == [Chat("set: row 1", messages)]


@pytest.mark.parametrize(
    ("record", "suggested"),
    [
        ({"query": "q", "response": "a", "type": "GSM"}, "question=query,answer=response"),  # MetaMathQA
        ({"instruction": "q", "context": "", "response": "a"}, "question=instruction,answer=response"),  # dolly
        ({"system_prompt": "", "question": "q", "response": "a"}, "question=question,answer=response"),  # OpenOrca
        ({"Frage": "q", "Antwort": "a"}, "question=Frage,answer=Antwort"),
        ({"article": "t", "date": "d"}, "text=article"),
        ({"sentence1": "x", "sentence2": "y"}, "question=COLUMN,answer=COLUMN"),
    ],
)
def test_an_unknown_form_is_refused_with_names_to_map(record: dict[str, str], suggested: str, tmp_path: Path) -> None:
    path = written(tmp_path / "data.jsonl", json.dumps(record))
    with pytest.raises(UserError, match=rf"--columns {suggested} \[P103\]$") as refusal:
        chats(path)
    found = f"{path}:1: found the columns {', '.join(map(repr, record))}; "
    assert str(refusal.value).startswith(found + ("allowed: " if "COLUMN" in suggested else "tell what they are: "))
    if "COLUMN" not in suggested:
        assert len(chats(path, suggested)[0]) == (1 if suggested.startswith("text") else 2)


def test_names_of_columns_may_have_capitals(tmp_path: Path) -> None:
    path = written(tmp_path / "data.csv", "Question, ANSWER\n1+1?,2\n")
    assert chats(path) == [[Q, A]]


def test_columns_are_read_by_other_names(tmp_path: Path) -> None:
    """And no others: the messages of the record do not count."""
    record = {"frage": "1+1?", "antwort": "2", "messages": turns("H", "I")}
    path = written(tmp_path / "data.jsonl", json.dumps(record))
    assert chats(path, "question=frage, answer=antwort") == [[Q, A]]
    with pytest.raises(UserError, match=r"jsonl:1: --columns names 'reply'; allowed: 'frage', 'antwort', 'messages'"):
        chats(path, "question=frage,answer=reply")
    for text in ("question", "question=frage,", "=frage", "a=b=c", "", "question=frage,question=antwort"):
        with pytest.raises(Exception, match="allowed: NAME=COLUMN"):
            columns(text)


def test_preferences_may_repeat_the_prompt() -> None:
    """As in HuggingFaceH4/ultrafeedback_binarized."""
    no = {"role": "assistant", "content": "3"}
    record = {"prompt": "1+1?", "chosen": [Q, A], "rejected": [Q, no], "score_chosen": 8.0}
    pair = (Chat("set: row 1", [Q, A]), Chat("set: row 1", [Q, no]))
    assert read_preferences(records("set", rows=[record])) == [pair]
    del record["prompt"]
    assert read_preferences(records("set", rows=[record])) == [pair]
    with pytest.raises(UserError, match="set: row 1: chosen and rejected answer different messages; needed: the same"):
        read_preferences(records("set", rows=[record | {"rejected": [*turns("H"), no]}]))
    with pytest.raises(UserError, match=r"--columns prompt=question,chosen=chosen,rejected=worse \[P103\]$"):
        read_preferences(records("set", rows=[{"question": "q", "chosen": "a", "worse": "b"}]))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.csv", "question, answer,answer \nq,a,b\n", "x.csv:1: 'answer' occurs twice; needed: a name once"),
        ("x.jsonl", '\n{"text": "a", "text": "b"}', "x.jsonl:2: 'text' occurs twice; needed: a name once"),
        ("x.json", '[{"messages": [{"role": "user", "role": "x"}]}]', "x.json: 'role' occurs twice; needed"),
        ("x.csv", "Question,question ,answer\nq,r,a\n", "x.csv:2: 'Question' and 'question' are one name; needed"),
        ("x.csv", "instruction,output,Input,input\nq,a,,r\n", "x.csv:2: 'Input' and 'input' are one name; needed"),
    ],
)
def test_a_name_that_occurs_twice_is_refused(name: str, text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        chats(written(tmp_path / name, text))


def test_names_that_are_not_used_may_be_alike(tmp_path: Path) -> None:
    path = written(tmp_path / "x.csv", "question,answer,ID,id,,\n1+1?,2,1,2,,\n")
    assert chats(path) == [[Q, A]]


# ---- Files ----

COMMAS = 'question,answer\n1+1?,2\n"a, ""b""\nc",007\n\n'


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("data.csv", COMMAS, "utf-8"),
        ("data.csv", COMMAS.replace("\n", "\r\n"), "utf-8-sig"),
        ("data.csv", COMMAS.replace(",", ";").replace("a;", "a,"), "utf-8"),
        ("data.CSV", COMMAS.replace(",", "\t").replace("a\t", "a,"), "utf-8"),
        ("data.tsv", COMMAS.replace(",", "\t").replace("a\t", "a,"), "utf-8-sig"),
    ],
)
def test_a_table_is_read_as_texts(name: str, text: str, encoding: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, text, encoding)
    quoted = 'a, "b"\r\nc' if "\r" in text else 'a, "b"\nc'
    assert read_chats(records(path)) == [Chat(f"{path}:2", [Q, A]), Chat(f"{path}:3", turns(quoted, "007"))]


def test_a_tsv_is_separated_by_tabs_whatever_its_names_contain(tmp_path: Path) -> None:
    path = written(tmp_path / "x.TSV", "question\tanswer\twho, when, where\n1+1?\t2\tI, now, here\n")
    assert chats(path) == [[Q, A]]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("question,answer\nq,a\na, b,c\n", r"csv:3: found 3 cells; the first line has 2; needed: cells between ','"),
        ("question,answer\nq\n", r"csv:2: found 1 cells; the first line has 2; needed"),
        ('question,answer\nq,"a\n', r"csv: not a table: .*; needed: cells between ',', in double quotes"),
        ("question|answer\nq|a\n", r"csv:2: found the columns 'question\|answer'; allowed"),
        ("question,answer\nq,a\nb,\n", r"csv:3: the assistant's content is ''; needed: a text that is not empty"),
        ("question,answer\n", "csv: is empty; needed: at least one record"),
        ("1+1?,2\n1+2?,3\n", r"csv:2: found the columns '1\+1\?', '2'; allowed"),
    ],
)
def test_a_wrong_table_is_refused(text: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=found):
        chats(written(tmp_path / "data.csv", text))


def test_a_table_in_an_older_encoding_is_refused_by_its_line(tmp_path: Path) -> None:
    """As Excel writes it under "CSV"."""
    table = written(tmp_path / "data.csv", "question,answer\nq,a\nMüller?,b\n", "cp1252")
    with pytest.raises(UserError, match=r'csv: line 3 .* \(byte 0xfc\); allowed: UTF-8; .* as "CSV UTF-8" \[P102\]$'):
        list(records(table))


def test_a_parquet_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    rows = [{"question": "1+1?", "answer": 2, "score": 0.5}, {"question": "1+1?", "answer": None, "score": None}]
    Dataset.from_list(rows).to_parquet(path)
    with pytest.raises(UserError, match=r"parquet: row 2: the assistant's content is None; needed: a text"):
        chats(str(path))
    Dataset.from_list(rows[:1]).to_parquet(path)
    assert read_chats(records(str(path))) == [Chat(f"{path}: row 1", [Q, A])]
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"parquet: cannot be read: .*; allowed: a table in Parquet"):
        chats(str(path))


def test_texts_are_files(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name, text in {"b.txt": "B\n", "a.TXT": "\ufeffA", "more/c.txt": "C"}.items():
        written(tmp_path / name, text)
    assert [chat[0]["content"] for chat in chats(str(tmp_path))] == ["A", "B\n", "C"]
    assert chats(str(tmp_path / "b.txt")) == [[{"role": "assistant", "content": "B\n"}]]
    assert is_records(str(tmp_path))
    written(tmp_path / "empty.txt", " \n")
    with pytest.raises(UserError, match=r"empty\.txt: is empty"):
        chats(str(tmp_path))
    written(tmp_path / "metadata.csv", "x")
    assert not is_records(str(tmp_path))  # a data set of some other kind
    with pytest.raises(UserError, match=r"is a folder with other files than texts; allowed: .*folder of \.txt"):
        chats(str(tmp_path))


def test_what_looks_like_a_path_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "notes.csv", "question,answer\nq,a\n")
    written(tmp_path / "notes.xml", "<a/>")
    for name in ("notes.csvv", "./train", "/no/train", "~/x", "a/b/c", "data/train.jsonl.gz", "notes.xml", "notes.csv"):
        assert is_records(name)
    for name in ("gsm8k", "openai/gsm8k", "Magpie-Align/Magpie-Llama-3.1-Pro", "org/v1.5"):
        assert not is_records(name)
    with pytest.raises(UserError, match=r"^notes\.csvv: no such file; did you mean notes\.csv.*\?; allowed: a \.jsonl"):
        chats("notes.csvv")
    with pytest.raises(UserError, match=r"^no/train\.csv: no such file; allowed: a \.jsonl"):
        chats("no/train.csv")
    with pytest.raises(UserError, match=r"^notes\.xml: is of an unknown kind; allowed: a \.jsonl"):
        chats("notes.xml")


# ---- Tokens ----


def test_all_of_a_text_is_learned_in_parts() -> None:
    tokenizer = tiny_tokenizer()
    rows, cut, left_out = encode([Chat("", [{"role": "assistant", "content": "abcdefghij"}])], tokenizer, 5)
    assert (cut, left_out) == (0, 0)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["abcde", "efghi", "ij</s>"]
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert tokenizer.chat_template is None  # it is not trained to chat
    assert end_of_answer(tokenizer) == [tokenizer.eos_token_id]

    rows, _, _ = encode([Chat("", [{"role": "assistant", "content": "abcd"}])], tokenizer, 5)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["abcd</s>"]


def test_the_first_example_is_shown_as_it_is_read() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}</s>\n{% endfor %}"
    rows, _, _ = encode([Chat("", [Q, A])], tokenizer, 100)
    assert shown(rows[0], tokenizer) == "given     user:\n          1+1?</s>\nlearned   assistant:\n          2</s>"
    preference = {"prompt": [Q], "chosen": [A], "rejected": turns("", "3")[1:]}
    assert shown(preference, tokenizer).endswith(
        "chosen    assistant:\n          2</s>\nrejected  assistant:\n          3</s>"
    )
    long = [{"role": "user", "content": "\n".join(map(str, range(99)))}, {"role": "assistant", "content": "a" * 200}]
    rows, _, _ = encode([Chat("", long)], tokenizer, 1000)
    lines = shown(rows[0], tokenizer).splitlines()
    assert lines[:3] == ["given     user:", "          …", "          95"]
    assert lines[-1] == f"          {'a' * 69}…{'a' * 26}</s>"
    assert len(lines) <= 12
    text = {"input_ids": [5, 6], "labels": [5, 6]}
    assert shown(text, tokenizer) == f"learned   {tokenizer.decode([5, 6])}"
