"""Whatever lies in an adapter's folder: it loads as the function that was saved, or is refused with a ValueError that
names the file, and the tensor where one is at fault, and the model is as it was."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from damage import (
    DTYPES,
    FIELDS,
    FILES,
    FORGEABLE,
    NUMBERS,
    RECORD,
    STARTS,
    WEIGHTS,
    Saved,
    alike,
    changed,
    damage_bytes,
    damage_tensors,
    exchanged,
    joined,
    make_saved,
    remove,
    signed,
    split,
)
from pissa import PissaModel


def many(default: int) -> pytest.MarkDecorator:
    """As many examples, and ten times as many with -m slow."""
    return pytest.mark.parametrize("examples", [default, pytest.param(10 * default, marks=pytest.mark.slow)])


def hypothetical(examples: int) -> settings:
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck]
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    return {form: make_saved(form, tmp_path_factory.mktemp(form)) for form in FIELDS}


@pytest.fixture
def saved(made: dict[str, Saved], request: pytest.FixtureRequest) -> Iterator[Saved]:
    """Of the form that the test is parametrized with."""
    one = made[request.param]
    one.reset()
    yield one
    one.reset()


forms = pytest.mark.parametrize("saved", FIELDS, indirect=True)
implicit = pytest.mark.parametrize("saved", ["implicit"], indirect=True)


@forms
def test_undamaged_it_loads_in_every_way(saved: Saved) -> None:
    assert saved.attempt()


@many(40)
@forms
def test_damaged_bytes(saved: Saved, examples: int) -> None:
    for seed in range(examples):
        damage_bytes(saved, seed)


@many(40)
@pytest.mark.parametrize("name", [WEIGHTS, STARTS])
@implicit
def test_changed_headers(saved: Saved, name: str, examples: int) -> None:
    header, data = split(saved.content[name])

    @hypothetical(examples)
    @given(changed(header, lambda part: st.sampled_from(DTYPES if isinstance(part, str) else NUMBERS)))
    def run(change: tuple[Any, set[Any]]) -> None:
        saved.reset()
        (saved.folder / name).write_bytes(joined(change[0], data))
        saved.attempt(name)

    run()


@many(15)
@forms
def test_damaged_tensors(saved: Saved, examples: int) -> None:
    for seed in range(examples):
        damage_tensors(saved, seed)


@many(4)
@forms
def test_exchanged_tensors(saved: Saved, examples: int) -> None:
    for seed in range(examples):
        dice = random.Random(seed)
        name = dice.choice([WEIGHTS, STARTS])
        header, data = split(saved.content[name])
        tensors = load_file(saved.folder / name)
        key = dice.choice(sorted(tensors))
        before = dict(tensors)
        first = exchanged(tensors, key, dice)
        other = next((o for o in tensors if o != first and tensors[o] is not before[o]), None)
        if other is None:
            continue
        header[first], header[other] = header[other], header[first]
        (saved.folder / name).write_bytes(joined(header, data))
        saved.attempt(name, repr(first), refused=True)
        saved.reset()


@many(60)
@forms
def test_changed_records(saved: Saved, examples: int) -> None:
    record = json.loads(saved.content[RECORD])

    @hypothetical(examples)
    @given(changed(record, alike), st.sampled_from([True, True, True, False]))
    def run(change: tuple[Any, set[Any]], sign: bool) -> None:
        content, keys = change
        saved.reset()
        (saved.folder / RECORD).write_text(json.dumps(signed(content) if sign else content))
        saved.attempt(exact=not (sign and keys & FORGEABLE))

    run()


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no such targets": ({"target_modules": ["nope"]}, "Target modules {'nope'} not found"),
    "no pattern": ({"target_modules": "*"}, "nothing to repeat"),
    "no such layer": ({"layers_to_transform": [99]}, "not found"),
    "another rank": ({"r": 3}, "rank 3"),
    "a rank that is too large": ({"r": 99}, "rank 99 is too large"),
    "an unknown task": ({"task_type": "NOPE"}, "NOPE"),
    "a module more": ({"modules_to_save": ["lm_head"]}, "tensor 'base_model.model.lm_head.weight' is missing"),
    "another residual": ({"double_quant": False}, "form: got nf4 (blocksize 64, double_quant True); config has nf4"),
    "another format": ({"quant": "int8"}, "form: got nf4 (blocksize 64, double_quant True); config has int8"),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("saved", ["nf4"], indirect=True)
def test_configurations_that_do_not_fit(saved: Saved, config: str) -> None:
    """What PEFT, or a layer, says of a configuration in a folder, names the file."""
    fields, words = CONFIGS[config]
    record = json.loads(saved.content[RECORD])
    record["config"] |= fields
    (saved.folder / RECORD).write_text(json.dumps(signed(record)))
    saved.attempt(words, refused=True, ways=("base", "fresh"))


@implicit
def test_a_name_that_is_there_twice(saved: Saved) -> None:
    """One of the two would win, and another reader might take the other."""
    text = saved.content[RECORD].decode()
    (saved.folder / RECORD).write_text(text.replace('"seed": 0', '"seed": 1, "seed": 0'))
    saved.attempt(RECORD, "'seed' is there twice", refused=True)
    for name in (WEIGHTS, STARTS):
        saved.reset()
        header, data = split(saved.content[name])
        key = next(key for key in header if key != "__metadata__")
        twice = json.dumps(header)[:-1] + f", {json.dumps({key: header[key]})[1:]}"
        (saved.folder / name).write_bytes(len(twice).to_bytes(8, "little") + twice.encode() + data)
        saved.attempt(name, f"{key!r} is there twice", refused=True)


TEXTS = {
    "empty": "",
    "a list": "[]",
    "null": "null",
    "deep": "[" * 1_000_000,
    "deep objects": '{"a":' * 100_000,
    "NaN": '{"format": NaN}',
    "infinite": '{"format": 1e999}',
    "many digits": '{"format": ' + "9" * 10_000 + "}",
    "a lone surrogate": '{"\\ud800": 1, "format": 1}',
    "twice": '{"format": 1, "format": 1}',
    "NUL": "\0",
}


@pytest.mark.parametrize("text", TEXTS)
@implicit
def test_records_of_other_json(saved: Saved, text: str) -> None:
    (saved.folder / RECORD).write_text(TEXTS[text])
    saved.attempt(RECORD, refused=True)


@implicit
def test_a_record_in_another_encoding(saved: Saved) -> None:
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        (saved.folder / RECORD).write_bytes(saved.content[RECORD].decode().encode(encoding))
        saved.attempt(RECORD, refused=True)


# ---- Files that are something else -----------------------------------------------------------------------------------


class Executed:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Executed(path.parent / "executed")))


def torch_pickled(path: Path) -> None:
    torch.save({"a": Executed(path.parent / "executed")}, path)


def beside(path: Path) -> None:
    for name in ("adapter_model.bin", "pissa.bin", "pissa.pt", "pissa.json.pkl"):
        torch_pickled(path.with_name(name))


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


KINDS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": Path.touch,
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to a name that is too long": lambda path: path.symlink_to("x" * 1000),
    "link to a folder": lambda path: path.symlink_to(".."),
    "link to zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "link to null": lambda path: path.symlink_to("/dev/null"),
    "a terabyte of zeros": sparse,
    "pickle": pickled,
    "torch's pickle": torch_pickled,
    "pickle beside": beside,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
@implicit
def test_files_of_another_kind(saved: Saved, name: str, kind: str) -> None:
    remove(saved.folder / name)
    KINDS[kind](saved.folder / name)
    try:
        saved.attempt(name, refused=True)
        assert not (saved.folder / "executed").exists()
    finally:
        for path in [
            saved.folder / name,
            *saved.folder.glob("*.bin"),
            *saved.folder.glob("*.p*t*"),
            *saved.folder.glob("*.pkl"),
        ]:
            remove(path)


@pytest.mark.parametrize("name", [WEIGHTS, STARTS])
@implicit
def test_a_terabyte_that_is_declared_is_not_read(saved: Saved, name: str) -> None:
    """In the place of a tensor, and beside the tensors; the file is as large as it says, which no memory may be."""
    header, data = split(saved.content[name])
    last = max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
    start, end = header[last]["data_offsets"]
    for key, begin in ((last, start), ("surplus", end)):
        huge = header | {key: {"dtype": "F32", "shape": [1 << 38], "data_offsets": [begin, begin + (1 << 40)]}}
        content = joined(huge, data)
        (saved.folder / name).write_bytes(content)
        os.truncate(saved.folder / name, len(content) - len(data) + begin + (1 << 40))
        saved.attempt(name, refused=True)


@pytest.mark.parametrize("other", FIELDS)
@forms
def test_an_adapter_of_another_kind_in_the_model(saved: Saved, other: str, made: dict[str, Saved]) -> None:
    host = made[other]
    dataclasses.replace(saved, host=host.host, pristine=host.pristine).attempt(ways=("default", "fresh"))
    host.renew()


@forms
def test_links_to_the_files_are_followed(saved: Saved, tmp_path: Path) -> None:
    for name in FILES:
        (saved.folder / name).replace(tmp_path / name)
        (saved.folder / name).symlink_to(tmp_path / name)
    assert saved.attempt()


@implicit
def test_folders_of_another_kind(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder in ("file", "nothing", "loop", "", "a\0b", "x" * 5000):
        with pytest.raises(ValueError, match="holds no PiSSA adapter"):
            PissaModel.from_pretrained(saved.base, f"{tmp_path}/{folder}")
