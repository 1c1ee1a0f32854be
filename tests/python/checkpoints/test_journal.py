"""The journal: units that count after a kill, after a power failure, and runs that are not the same."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pissa.checkpoints import journal
from pissa.checkpoints.journal import Journal, begin, check

IDENTITY: dict[str, Any] = {"rank": 4, "patterns": {"q": 8}, "source": {"a": "12 bytes", "b": "13 bytes"}, "init": None}


def nothing() -> None: ...


def opened(folder: Path, flush: Callable[[], None] = nothing) -> Journal:
    folder.mkdir(exist_ok=True)
    return Journal(folder, flush)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def other_boot(folder: Path) -> None:
    """As if the system had been started again since."""
    for path in folder.glob("*.jsonl"):
        path.write_text(path.read_text().replace(str(journal._boot()), "another"))


def test_units_of_all_processes_count(tmp_path: Path) -> None:
    results = {"a": {"error": 0.1, "name": "ü\n"}, "b": [1, None], "c": 1e300}
    processes = [opened(tmp_path) for _ in results]
    for process, (unit, result) in zip(processes, results.items(), strict=True):
        process.add(unit, result)  # nobody closes: they are killed
        assert process.done == {unit: result}
    assert opened(tmp_path).done == results
    assert len([*tmp_path.glob("*.jsonl")]) == 4


@pytest.mark.parametrize("torn", [b'{"un', b'{"unit": "c", "result": 1}', b"\0" * 30])
def test_a_torn_last_line_does_not_count(torn: bytes, tmp_path: Path) -> None:
    opened(tmp_path).add("a", 1)
    with open(tmp_path / "000000.jsonl", "ab") as file:
        file.write(torn)
    second = opened(tmp_path)
    assert second.done == {"a": 1}
    second.add("c", 2)
    assert opened(tmp_path).done == {"a": 1, "c": 2}


@pytest.mark.parametrize(
    "line", ["[", "[]", "3", '{"unit": "b"}', '{"unit": "b", "unit": "c", "result": 1}', "{}", "\0"]
)
def test_behind_a_damaged_line_nothing_counts(line: str, tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.add("a", 1)
    with open(tmp_path / "000000.jsonl", "a") as file:
        file.write(line + "\n")
    first.add("b", 1)
    assert opened(tmp_path).done == {"a": 1}


def test_after_a_power_failure_what_was_flushed_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes = []
    process = opened(tmp_path, lambda: flushes.append(len(process.done)))
    process.add("a", 1)
    process.add("b", 2)
    assert flushes == []
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 0.0)
    process.add("c", 3)
    process._wait()
    monkeypatch.undo()
    process.add("d", 4)
    assert flushes == [3]
    assert opened(tmp_path).done == {"a": 1, "b": 2, "c": 3, "d": 4}
    other_boot(tmp_path)
    assert opened(tmp_path).done == {"a": 1, "b": 2, "c": 3}
    process.flush()
    assert flushes == [3, 4]
    assert opened(tmp_path).done == {"a": 1, "b": 2, "c": 3, "d": 4}


def test_on_a_system_without_a_name_for_its_start_what_was_flushed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_boot", lambda: None)
    process = opened(tmp_path)
    process.add("a", 1)
    process.flush()
    process.add("b", 2)
    assert opened(tmp_path).done == {"a": 1}


def test_units_that_come_during_a_flush_are_not_taken_for_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 0.0)
    may_end = threading.Event()
    process = opened(tmp_path, lambda: may_end.wait(60) and None)
    process.add("a", 1)
    process.add("b", 2)  # does not wait for the flush, and starts no second one
    may_end.set()
    process._wait()
    assert [line["flushed"] for line in lines(tmp_path) if "flushed" in line] == [1]
    other_boot(tmp_path)
    assert opened(tmp_path).done == {"a": 1}
    process.flush()


def test_the_files_are_flushed_before_the_journal_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    process = opened(tmp_path, lambda: order.append(f"files, {len(lines(tmp_path))} lines"))
    monkeypatch.setattr(os, "fdatasync", lambda handle: order.append(f"journal, {len(lines(tmp_path))} lines"))
    process.add("a", 1)
    process.flush()
    assert order == ["files, 2 lines", "journal, 3 lines"]


def test_a_flush_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("the disk fails")

    process = opened(tmp_path, fail)
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 0.0)
    process.add("a", 1)
    with pytest.raises(OSError, match="the disk fails"):
        process.flush()
    other_boot(tmp_path)
    assert opened(tmp_path).done == {}


def test_closing_flushes_nothing(tmp_path: Path) -> None:
    """Who interrupts a run does not wait for the disk."""
    process = opened(tmp_path, lambda: pytest.fail("flushed"))
    process.add("a", 1)
    process.close()
    assert opened(tmp_path).done == {"a": 1}


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = opened(tmp_path)
    monkeypatch.setattr(os, "write", lambda handle, content: len(content) - 1)
    with pytest.raises(OSError, match=rf"{tmp_path}/000000\.jsonl cannot be written: {os.strerror(errno.ENOSPC)}"):
        process.add("a", 1)
    assert process.done == {}


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        opened(tmp_path).add("a", float("nan"))


# ---- The identity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 8}, "rank was 4, is 8"),
        ({"rank": 4.5, "init": "lora"}, "rank was 4, is 4.5; init was None, is 'lora'"),
        ({"patterns": {}}, "patterns.q was 8, is None"),
        ({"source": {"a": "12 bytes", "b": "14 bytes"}}, "source.b was '13 bytes', is '14 bytes'"),
        ({"new": 1}, "new was None, is 1"),
        ({name: name for name in "abcde"}, "c was None, is 'c'; and 2 more"),
    ],
)
def test_another_plan_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = tmp_path / "out" / ".unfinished"
    begin(folder, IDENTITY)
    check(folder, IDENTITY)
    with pytest.raises(ValueError, match=re.escape(f"{folder} is of an unfinished run")) as caught:
        check(folder, IDENTITY | change)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[", '{"rank": 4, "rank": 4}', "\0", '{"a": NaN}'])
def test_a_damaged_identity_is_refused(content: str, tmp_path: Path) -> None:
    begin(tmp_path, IDENTITY)
    (tmp_path / journal.IDENTITY).write_text(content)
    with pytest.raises(
        ValueError, match=rf"{journal.IDENTITY} cannot be read: .*\. To start anew, remove {tmp_path.parent}, or"
    ):
        check(tmp_path, IDENTITY)
