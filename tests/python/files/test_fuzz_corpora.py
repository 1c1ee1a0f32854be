"""The inputs that fuzzing has found, and those that were a mistake's, given to every parser; `make fuzz` finds more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import fuzzing


@pytest.mark.parametrize("name", fuzzing.PARSERS)
@pytest.mark.filterwarnings("ignore")  # transformers', of configurations
def test_every_input_is_read_or_refused(name: str, tmp_path: Path) -> None:
    module, accepted, failed = fuzzing.parser(name), set(), {}
    for path in fuzzing.inputs(name):
        try:
            accepted.add(fuzzing.check(module, path.read_bytes(), tmp_path)[0])
        except Exception as error:  # whatever it is, it is no refusal
            failed[path.name] = repr(error)
    assert failed == {}
    assert accepted == {True, False}  # the corpus has both


def no_value_error(folder: Path) -> None:
    raise KeyError("model.json")


def without_the_file(folder: Path) -> None:
    raise ValueError("it is damaged")


def unprintable(folder: Path) -> None:
    raise ValueError("model.json: \ud800")


def large(folder: Path) -> None:
    bytearray(fuzzing.SPARE + 1000)


def slow(folder: Path) -> None:
    sum(range(10**6))


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (no_value_error, "model.json"),
        (without_the_file, "does not name model.json"),
        (unprintable, "surrogates not allowed"),
        (large, "bytes of memory for an input of 2"),
        (slow, " s$"),
    ],
)
def test_what_is_a_crash(
    parse: Callable[[Path], None], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "SECONDS", 1.0 if parse is not slow else 0.0)
    module = SimpleNamespace(FILE="model.json", parse=parse)
    with pytest.raises((KeyError, ValueError, AssertionError), match=words):
        fuzzing.check(module, b"{}", tmp_path)


def test_refusals_and_results_are_none(tmp_path: Path) -> None:
    def parse(folder: Path) -> None:
        if (folder / "model.json").read_bytes() != b"{}":
            raise ValueError("model.json is damaged")

    module = SimpleNamespace(FILE="model.json", parse=parse)
    assert [fuzzing.check(module, data, tmp_path)[0] for data in (b"{}", b"[")] == [True, False]
