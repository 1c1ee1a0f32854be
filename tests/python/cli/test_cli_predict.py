"""`pissa predict`: a table comes back equal but for its new column, whatever interrupts the command."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pissa.cli import generation, main
from pissa.cli.answered import write_answered
from runs import refused

MESSY = '\ufefffrage;Notiz;leer\r\n"17+1";"a; ""b""";\r\n;keine Frage;\r\n"zwei\r\nZeilen";Zürich, 東京;\r\n3+1;;x\r\n'


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "new.csv"
    path.write_bytes(MESSY.encode())
    return path


def predict(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["predict", str(model), "--data", str(data), "--out", str(out), "--max-tokens", "4", *more]


def cells(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), delimiter=";"))


def asked(folder: Path, prompt: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `pissa chat` answers."""
    capsys.readouterr()
    assert main(["chat", str(folder), "--prompt", prompt, "--temperature", "0", "--max-tokens", "4"]) == 0
    return capsys.readouterr().out.strip()


def test_a_table_comes_back_with_the_answers_of_chat_in_a_new_column(
    base: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.csv"
    assert main(predict(base, table, out, "--columns", "question=frage", "--expected", "Notiz")) == 0
    said = capsys.readouterr().out
    assert "right     0 of 2; always" in said
    assert "1 row: the question is empty, and so is the answer" in said
    before, after = cells(table), cells(out)
    assert [row[:-1] for row in after] == before
    assert [row[-1] for row in after][:1] == ["answer"]
    for (question, *_), row in zip(before[1:], after[1:], strict=True):
        assert row[-1] == (asked(base, question, capsys) if question else "")
    assert out.read_bytes().startswith(b"\xef\xbb\xbffrage;Notiz;leer;answer\r\n")
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")]


@pytest.mark.parametrize("text", ['a "b"', "a;b", "two\nlines", "two\rlines", "", " x "])
def test_an_answer_is_one_cell_whatever_it_contains(text: str, table: Path, tmp_path: Path) -> None:
    write_answered(table, tmp_path / "out.csv", "answer", [text, "", text, "x"])
    assert [row[-1] for row in cells(tmp_path / "out.csv")] == ["answer", text, "", text, "x"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_every_kind_of_table_keeps_its_rows(kind: str, base: Path, tmp_path: Path) -> None:
    import datasets

    rows = [{"question": f"{i}+1", "answer": i + 1, "more": ["é", i]} for i in range(3)]
    data, out = tmp_path / f"rows.{kind}", tmp_path / f"out.{kind}"
    rows = [row | {"more": f"é{row['question']}"} for row in rows]
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(data)
    else:
        text = json.dumps(rows) if kind == "json" else "".join(f"{json.dumps(row)}\n" for row in rows)
        data.write_text(text)
    assert main(predict(base, data, out)) == 0
    if kind == "parquet":
        found = datasets.Dataset.from_parquet(str(out)).to_list()
    else:
        found = json.loads(out.read_text()) if kind == "json" else [*map(json.loads, out.read_text().splitlines())]
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    assert all(isinstance(row["predicted"], str) and len(row) == 4 for row in found)


def test_pipes_take_a_table_and_give_one(
    base: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    given = io.TextIOWrapper(io.BytesIO(b"question,id\n1+1,a\n2+1,b\n"))
    monkeypatch.setattr(sys, "stdin", given)
    assert main(predict(base, Path("-"), Path("-"))) == 0
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert [line.rsplit(",", 1)[0] for line in lines] == ["question,id", "1+1,a", "2+1,b"]


def test_an_interrupted_command_asks_only_what_has_no_answer(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, whole = tmp_path / "rows.csv", tmp_path / "out.csv", tmp_path / "whole.csv"
    data.write_text("question\n" + "".join(f"{i}+1\n" for i in range(9)))
    assert main(predict(base, data, whole)) == 0
    given, prompts = generation.generate_each, list[int]()

    def some(model: Any, tokenizer: Any, asked: Any, *more: Any) -> Any:
        prompts.append(len(asked))
        for number, found in enumerate(given(model, tokenizer, asked, *more)):
            if len(prompts) == 1 and number == 4:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(generation, "generate_each", some)
    assert main(predict(base, data, out)) == 130
    part = tmp_path / "out.csv.part"
    assert f"4 of 9 rows done; the same command goes on from {part}" in capsys.readouterr().err
    assert not out.exists()
    part.write_bytes(part.read_bytes()[:-3])  # as a kill leaves it
    assert "with another --system" in refused(predict(base, data, out, "--system", "Be brief."), capsys)
    assert main(predict(base, data, out)) == 0
    assert prompts == [9, 6]
    assert out.read_bytes() == whole.read_bytes()
    assert "exists, and nothing is overwritten" in refused(predict(base, data, out), capsys)


@pytest.mark.nightly
def test_killed_five_times_each_row_is_answered_once(base: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    data.write_text("question\n" + "".join(f"{i}+1\n" for i in range(2000)))
    command = [sys.executable, "-m", "pissa", *predict(base, data, out, "--max-tokens", "16")]
    kept, chance = [0], random.Random(0)
    while len(kept) < 6:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        part = tmp_path / "out.csv.part"
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") <= kept[-1] + 1):
            time.sleep(0.01)
        time.sleep(chance.random() / 4)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if out.exists():
            break
        kept.append(part.read_bytes().count(b"\n") - 1)
    assert len(kept) == 6
    subprocess.run(command, check=True, capture_output=True)
    found = list(csv.reader(io.StringIO(out.read_bytes().decode(), newline="")))
    assert [row[0] for row in found] == ["question", *(f"{i}+1" for i in range(2000))]
    assert {len(row) for row in found} == {2}
