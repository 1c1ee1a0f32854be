"""JSON of others: whatever is in it, the message is one printable line that names the file. None of their code runs."""

from __future__ import annotations

import builtins
import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from pissa.files.json_file import parse_json
from pissa.files.messages import first_line, shown
from pissa.files.model_folder import model_config, quantised_kind, read_config


def test_a_name_that_is_there_twice_is_found_at_once() -> None:
    """Not by counting each of 100,000 names in a list of them, which takes minutes."""
    names = [*range(100_000), 99_999]
    began = time.process_time()
    with pytest.raises(ValueError, match="'99999' is there twice"):
        parse_json(("{" + ",".join(f'"{name}":0' for name in names) + "}").encode())
    assert time.process_time() - began < 5


def test_values_are_shown_whatever_they_are() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "list of many levels"
    while deep:
        deep = deep.pop()  # Python frees a long chain, but not by recursion in every version


@pytest.mark.parametrize(
    ("text", "line"),
    [("\n one \ntwo", "one"), ("one:\n\n  two\nthree", "one: two"), ("\ud83d", "\\ud83d"), ("", "ValueError")],
)
def test_the_first_line_says_something(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line


LLAMA = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 2, "hidden_size": 64}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": []}, "unhashable type"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"hidden_size": "64"}, r"Validation error for field 'hidden_size': .*expected int, got str"),
        ({"id2label": {"a": 1}}, "invalid literal"),
    ],
)
def test_configurations_that_transformers_cannot_read(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = json.loads(LlamaConfig(**LLAMA).to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config.json describes no model that transformers .*{words}"):
        model_config(tmp_path)


def test_code_beside_a_model_is_neither_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}')
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'x')")
    asked = []
    monkeypatch.setattr(builtins, "input", lambda text="": asked.append(text) or "y")
    with pytest.raises(ValueError, match="contains custom code"):
        model_config(tmp_path)
    assert asked == []
    assert not (tmp_path / "executed").exists()


def test_how_weights_are_quantised(tmp_path: Path) -> None:
    LlamaConfig(**LLAMA).save_pretrained(tmp_path)
    assert quantised_kind(tmp_path) is None
    config = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert quantised_kind(tmp_path) == "gptq"
