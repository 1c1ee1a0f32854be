"""`pissa finetune` and `pissa dpo` on data as people have it: tables, texts, data sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from transformers import AutoTokenizer

from pissa.cli import main
from runs import command, exact, logged, refused

SHORT = ["--rank", "2", "--init", "lora"]


def plain(base: Path, folder: Path) -> Path:
    """A copy of the model whose tokenizer has no chat template."""
    folder.mkdir()
    for path in base.iterdir():
        if path.name != "chat_template.jinja":
            (folder / path.name).write_bytes(path.read_bytes())
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    return folder


def test_a_table_is_trained_by_named_columns_and_again_from_run_yaml(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "daten.csv"
    table.write_text("frage;antwort\n" + "".join(f"{i}+1?;{i + 1}\n" for i in range(16)))
    out, names = tmp_path / "run", ["--columns", "question=frage,answer=antwort"]
    assert main(command("finetune", base, table, out, *SHORT, *names, "--eval-data", str(table))) == 0
    said = capsys.readouterr().out
    assert f"data      {table}, 16 examples, " in said
    assert "\ngiven     u:0+1?</s>a:\nlearned   1</s>\n" in said
    assert said.count("given  ") == 1
    assert yaml.safe_load((out / "run.yaml").read_text())["columns"] == {"question": "frage", "answer": "antwort"}
    assert main(["finetune", "--config", str(out / "run.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert exact(tmp_path / "again") == exact(out)
    message = refused(command("finetune", base, table, tmp_path / "other", *SHORT), capsys)
    assert "--columns question=frage,answer=antwort" in message
    message = refused(command("finetune", base, table, out, *SHORT, "--resume"), capsys)
    assert "--columns was {'question': 'frage', 'answer': 'antwort'}, is None" in message
    mistyped = table.with_suffix(".csvv")
    message = refused(command("finetune", base, mistyped, tmp_path / "other", *SHORT), capsys)
    assert f"{mistyped}: no such file; did you mean {table}?; allowed: " in message


@pytest.mark.parametrize("form", ["chats", "texts"])
def test_a_template_is_saved_with_a_run_on_chats_only(form: str, base: Path, tmp_path: Path) -> None:
    model, texts, out = plain(base, tmp_path / "base"), tmp_path / "texts", tmp_path / "run"
    texts.mkdir()
    for i in range(8):
        (texts / f"{i}.txt").write_text(f"{i} and more " * 9)
    rows = [{"instruction": f"{i}+1", "input": "", "output": f"{i + 1}"} for i in range(8)]
    Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    data = texts if form == "texts" else tmp_path / "data.parquet"
    assert main(command("finetune", model, data, out, *SHORT, "--max-length", "300", steps=2)) == 0
    template = AutoTokenizer.from_pretrained(out).chat_template
    assert (template is None) == (form == "texts")
    assert template is None or "### Response:" in template


def test_a_data_set_is_read_as_a_file_is(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"{i}+1", "answer": i + 1} for i in range(16)]
    (tmp_path / "set").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    Dataset.from_list(rows).to_json(tmp_path / "data.jsonl")
    for name, data in {"a": tmp_path / "set", "b": tmp_path / "data.jsonl"}.items():
        assert main(command("finetune", base, data, tmp_path / name, *SHORT)) == 0
    assert exact(tmp_path / "a") == exact(tmp_path / "b")
    assert f"data      {tmp_path / 'set'}, split train, 16 examples, " in capsys.readouterr().out
    Dataset.from_list([{"query": "q", "response": "a"}]).to_parquet(tmp_path / "set" / "train.parquet")
    message = refused(command("finetune", base, tmp_path / "set", tmp_path / "c", *SHORT), capsys)
    assert f"{tmp_path / 'set'}, split train: row 1: found the columns 'query', 'response'; " in message
    assert message.endswith("--columns question=query,answer=response [P103]")


def test_a_table_of_preferences_is_trained(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "pairs.tsv"
    table.write_text("question\tchosen\trejected\n" + "".join(f"{i}+1\t{i + 1}\tno\n" for i in range(16)))
    names = ["--columns", "prompt=question,chosen=chosen,rejected=rejected"]
    assert main(command("dpo", base, table, tmp_path / "run", *SHORT, *names, steps=2)) == 0
    assert len(logged(tmp_path / "run")) == 2
    assert "given     u:0+1</s>a:\nchosen    1</s>\nrejected  no</s>\n" in capsys.readouterr().out
