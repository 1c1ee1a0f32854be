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
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

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
    few_or_many,
    hypothetical,
    joined,
    make_saved,
    remove,
    signed,
    split,
)
from pissa import PissaModel
from pissa.files.tensor_file import write_tensors


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


@few_or_many
@forms
def test_damaged_bytes(saved: Saved, examples: int) -> None:
    for seed in range(examples):
        damage_bytes(saved, seed)


@few_or_many
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


@few_or_many
@forms
def test_damaged_tensors(saved: Saved, examples: int) -> None:
    for seed in range(examples):
        damage_tensors(saved, seed)


@few_or_many
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


@few_or_many
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


def flip_last_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def one_bit(path: Path) -> None:
    """The checksums fit what the change leaves behind: it is found by what it breaks."""
    tensors = load_file(path)
    tensors[f"{Q}.a0"].view(torch.int32).view(-1)[3].bitwise_xor_(1 << 8)
    write_tensors(path, tensors)


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A record that says something else, and is signed."""

    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(signed(content)))

    return damage


Q = "model.layers.0.self_attn.q_proj"
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no weights": (WEIGHTS, Path.unlink, "adapter_model.safetensors is missing"),
    "a list": (RECORD, lambda path: path.write_text("[]"), "pissa.json cannot be read: the content: got []"),
    "empty record": (RECORD, lambda path: path.write_text("{}"), "pissa.json cannot be read: 'format'"),
    "newer format": (RECORD, edit(lambda c: c.update(format=2)), "pissa.json cannot be read: format 2"),
    "unknown option": (RECORD, edit(lambda c: c["config"].update(nonsense=1)), "unknown field 'nonsense'"),
    "passes in words": (
        RECORD,
        edit(lambda c: c["config"].update(svd_passes="many")),
        "pissa.json cannot be read: config.svd_passes: got 'many'; needed: ",
    ),
    "a word of the record": (
        RECORD,
        lambda path: path.write_text(path.read_text().replace('"seed": 0', '"seed": 1')),
        "pissa.json cannot be read: xxh3 is not the checksum",
    ),
    "a bit on the disk": (WEIGHTS, flip_last_bit, "v_proj.lora_B.weight' is damaged"),
    "a bit of a start": (STARTS, flip_last_bit, ".a0' is damaged"),
    "another bit": (STARTS, one_bit, f"do not belong together, or one is damaged: the tensor lora_A of layer {Q}"),
    "no checksums": (WEIGHTS, lambda path: save_file(load_file(path), path), "has no checksums of its "),
}


@pytest.mark.parametrize("damage", DAMAGE)
@implicit
def test_damaged_files_are_refused_by_name(saved: Saved, damage: str) -> None:
    name, change, words = DAMAGE[damage]
    change(saved.folder / name)
    saved.attempt(name, words, refused=True)


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


@pytest.mark.parametrize(
    ("saved", "other"),
    [(form, other) for form in FIELDS for other in FIELDS if "implicit" in (form, other)],
    indirect=["saved"],
)
def test_an_adapter_of_another_kind_in_the_model(saved: Saved, other: str, made: dict[str, Saved]) -> None:
    host = made[other]
    dataclasses.replace(saved, host=host.host, pristine=host.pristine).attempt(ways=("default", "fresh"))
    host.renew()


@implicit
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
