"""Whatever lies in a folder: it loads as what was saved, or is refused with a ValueError that names the file, and the
tensor where one is at fault; the model is as it was, nothing is half-written, and no code of the file is run."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import fuzzing
from daily import each
from damage import (
    BYTES,
    FIELDS,
    FILES,
    RECORD,
    STARTS,
    TENSORS,
    WEIGHTS,
    Saved,
    damage_tensors,
    make_saved,
    remove,
    write_record,
    write_text,
)
from mapped_files import read_tensors, unmap_unused
from pissa import PissaModel
from pissa.adapters.pissa_layout import MARK
from pissa.containers.checkpoint import Contents, ModelFolder
from pissa.containers.messages import first_line
from pissa.containers.model_folder import model_config, read_config

# ---- Every parser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fuzzing.PARSERS)
@pytest.mark.filterwarnings("ignore")  # transformers', of configurations
def test_every_input_is_read_or_refused(name: str, tmp_path: Path) -> None:
    """The inputs that fuzzing has found, and those that were a mistake's; `make fuzz` finds more."""
    module, accepted, failed = fuzzing.parser(name), set(), {}
    for path in fuzzing.inputs(name):
        unmap_unused()
        try:
            accepted.add(fuzzing.check(module, path.read_bytes(), tmp_path))
        except Exception as error:  # whatever it is, it is no refusal
            failed[path.name] = repr(error)
    assert failed == {}
    assert accepted == {True, False}  # the corpus has both


@pytest.mark.parametrize(
    ("error", "words"), [(KeyError("model.json"), "model.json"), (ValueError("damaged"), "does not name model.json")]
)
def test_what_is_a_crash(error: Exception, words: str, tmp_path: Path) -> None:
    def parse(folder: Path) -> None:
        if (folder / "model.json").read_bytes() == b"{}":
            raise error

    module = SimpleNamespace(FILE="model.json", parse=parse)
    assert fuzzing.check(module, b"[]", tmp_path)
    with pytest.raises((KeyError, AssertionError), match=words):
        fuzzing.check(module, b"{}", tmp_path)


@pytest.mark.parametrize(("text", "line"), [("\n one \ntwo", "one"), ("one:\n\n  two", "one: two"), ("", "ValueError")])
def test_the_first_line_says_something(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line


# ---- A model's config.json -------------------------------------------------------------------------------------------

LLAMA = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 2, "hidden_size": 64}


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"num_attention_heads": 0}, "modulo by zero"), ({"hidden_size": "64"}, "expected int, got str")],
)
def test_configurations_that_transformers_cannot_read(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = json.loads(LlamaConfig(**LLAMA).to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    path = re.escape(str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match=rf"^{path} cannot be read: .*{words}.* describes no model"):
        model_config(tmp_path)


def test_how_weights_are_quantised(tmp_path: Path) -> None:
    LlamaConfig(**LLAMA).save_pretrained(tmp_path)
    assert ModelFolder(tmp_path).contents is Contents.DENSE
    config = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert ModelFolder(tmp_path).contents is Contents.OTHER


# ---- An adapter's files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """The adapter of each form, made when it is first asked for."""
    found: dict[str, Saved] = {}

    def get(form: str) -> Saved:
        if form not in found:
            found[form] = make_saved(form, tmp_path_factory.mktemp(form))
        return found[form]

    return get


@pytest.fixture
def saved(made: Callable[[str], Saved], request: pytest.FixtureRequest) -> Iterator[Saved]:
    """Of the form that the test is parametrized with, or implicit."""
    one = made(getattr(request, "param", "implicit"))
    one.reset()
    yield one
    one.reset()


forms = pytest.mark.parametrize("saved", FIELDS, indirect=True)


@forms
def test_undamaged_it_loads_in_every_way(saved: Saved) -> None:
    assert saved.attempt()


@pytest.mark.parametrize("saved", each(FIELDS, ["implicit", "second"]), indirect=True)
def test_damaged_bytes(saved: Saved) -> None:
    for file in FILES:
        for damage in BYTES:
            saved.reset()
            (saved.folder / file).write_bytes(damage(saved.content[file], random.Random(damage.__name__)))
            # Of the LoRA, only the header is read. pissa.json is a copy, which is not read.
            saved.attempt(file, refused=file == STARTS)


@forms
def test_damaged_tensors(saved: Saved) -> None:
    for damage in TENSORS:
        damage_tensors(saved, damage, random.Random(damage.__name__))


def write_signed(saved: Saved, fields: dict[str, Any]) -> None:
    record = json.loads(saved.content[RECORD])
    record["config"] |= fields
    write_record(saved.folder, record)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no such targets": ({"target_modules": ["nope"]}, "Target modules {'nope'} not found"),
    "no pattern": ({"target_modules": "*"}, "nothing to repeat"),
    "no such layer": ({"layers_to_transform": [99]}, "not found"),
    "another rank": ({"r": 3}, "rank 3"),
    "a rank that is too large": ({"r": 99}, "rank 99 is too large"),
    "a seed in words": ({"seed": "many"}, "pissa.safetensors cannot be read: seed: got 'many'"),
    "an unknown option": ({"nonsense": 1}, "unknown field 'nonsense'"),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("saved", ["nf4"], indirect=True)
def test_configurations_that_do_not_fit(saved: Saved, config: str) -> None:
    """What PEFT, or a layer, says of a configuration in a folder, names the file."""
    fields, words = CONFIGS[config]
    write_signed(saved, fields)
    saved.attempt(words, refused=True, ways=("base", "fresh"))


def flip_last_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def newer(path: Path) -> None:
    write_record(path.parent, json.loads((path.parent / RECORD).read_text()) | {"format": 3})


def one_word(path: Path) -> None:
    write_text(path.parent, (path.parent / RECORD).read_text().replace('"seed": 0', '"seed": 1'))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty record": (lambda path: write_text(path.parent, "{}"), "cannot be read: 'format' is missing"),
    "newer format": (newer, "cannot be read: format 3 of pissa"),
    "a word of the record": (one_word, "cannot be read: xxh3 is not the checksum"),
    "a bit on the disk": (flip_last_bit, "v_proj.delta_b' is damaged"),
    "no record": (lambda path: save_file(read_tensors(path), path), "another program has written it"),
    "no checksums": (lambda path: save_file(read_tensors(path), path, {MARK: "{}"}), "has no checksums of its "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_by_name(saved: Saved, damage: str) -> None:
    change, words = DAMAGE[damage]
    change(saved.folder / STARTS)
    saved.attempt(STARTS, words, refused=True)


@pytest.mark.parametrize(
    ("saved", "other"),
    each(
        [(form, other) for form in FIELDS for other in FIELDS if form != other and "implicit" in (form, other)],
        ["dora"],
    ),
    indirect=["saved"],
)
def test_an_adapter_of_another_kind_in_the_model(saved: Saved, other: str, made: Callable[[str], Saved]) -> None:
    host = made(other)
    dataclasses.replace(saved, host=host.host, pristine=host.pristine).attempt(ways=("default", "fresh"))
    host.renew()


# ---- Files that are something else -----------------------------------------------------------------------------------


class Executed:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def torch_pickled(path: Path) -> None:
    torch.save({"a": Executed(path.parent / "executed")}, path)


KINDS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "folder": Path.mkdir,
    "pipe": lambda path: os.mkfifo(path),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Executed(path.parent / "executed"))),
    "torch's pickle": torch_pickled,
    "pickle beside": lambda path: torch_pickled(path.with_suffix(".bin")),
}


SYSTEM_CALLS = {"pipe": "mkfifo", "link to nothing": "symlink"}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.system_calls(*filter(None, [SYSTEM_CALLS.get(k)]))) for k in KINDS]
)
@pytest.mark.parametrize("name", FILES)
def test_files_of_another_kind(saved: Saved, name: str, kind: str) -> None:
    path = saved.folder / name
    remove(path)
    KINDS[kind](path)
    try:
        words = [f"{path.stem}.bin next to it is a pickle"] if kind == "pickle beside" else []
        is_gone = name == WEIGHTS and not os.path.lexists(path)  # it may be deleted
        loads = name == RECORD or is_gone
        assert saved.attempt(name, *words, refused=not loads) == loads
        assert not (saved.folder / "executed").exists()
    finally:
        remove(path)
        remove(path.with_suffix(".bin"))


@pytest.mark.system_calls("symlink")
def test_links_to_the_files_are_followed(saved: Saved, tmp_path: Path) -> None:
    for name in FILES:
        (saved.folder / name).replace(tmp_path / name)
        (saved.folder / name).symlink_to(tmp_path / name)
    assert saved.attempt()


@pytest.mark.system_calls("symlink")
def test_folders_of_another_kind(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder in ("file", "nothing", "loop", "", "x" * 5000):
        with pytest.raises(ValueError, match="holds no PiSSA adapter"):
            PissaModel.from_pretrained(saved.base, f"{tmp_path}/{folder}")
