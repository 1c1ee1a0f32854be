"""A folder is complete or not there: a run that is killed goes on to the same bytes, and one runs at a time."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import checkpoint_writer
import processes
from checkpoint_writer import (
    FILES,
    IDENTITY,
    batch_name,
    batches,
    content,
    layout_of,
    layouts,
    same_bits,
    tensors_of_all_dtypes,
    write,
    write_batch,
)
from daily import each
from pissa.checkpoints import output
from pissa.checkpoints.output import FINISHED, UNFINISHED, Output
from pissa.containers.staged import CompletedError
from pissa.containers.tensor_file import Layout, Source
from pissa.system import lock


def entered(folder: Path, **identity: object) -> Output:
    return Output(folder, IDENTITY | identity, layouts())


def test_nothing_is_there_before_all_is(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with entered(folder) as out:
        assert [path.name for path in folder.iterdir()] == [UNFINISHED]
        for file, name in batches():
            out.write(file, name, checkpoint_writer.tensors(file)[name])
        out.path("config.json").write_text("{}")
        assert [path.name for path in folder.iterdir()] == [UNFINISHED]
        out.finish()
    assert sorted(content(folder)) == sorted([*FILES, "config.json", FINISHED])


@pytest.mark.system_calls("fdatasync")
def test_every_process_flushes_before_the_first_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 puts the files in place, and can flush only what its own machine has."""
    events: list[object] = []
    flush, place = os.fdatasync, output.put_in_place
    monkeypatch.setattr(os, "fdatasync", lambda handle: events.append(handle) or flush(handle))
    monkeypatch.setattr(output, "put_in_place", lambda files: events.append("place") or place(files))
    write(tmp_path / "out")
    assert events[-1] == "place"
    assert len({*events[-1 - len(FILES) : -1]}) == len(FILES)


@pytest.mark.system_calls("fork")
@pytest.mark.parametrize("every", each([5, 1], [5]))
def test_killed_anywhere_it_goes_on_to_the_same_bytes(every: int, tmp_path: Path) -> None:
    """At every single call that changes the disk, at night; see checkpoint_writer."""
    command = [sys.executable, checkpoint_writer.__file__, "kill", str(tmp_path), str(every)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout)
    assert found["kills"] >= 60 / every
    assert found["resumed"] >= 30 / every


@pytest.mark.system_calls("torchrun")
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one")
    with entered(tmp_path / "two") as out:  # and go on with the work of one
        write_batch(out, *batches()[0])
    run = processes.launch(2, "checkpoint_writer.py", "share", tmp_path / "two")
    assert run.returncode == 0, run.stdout
    # Not by lines: both write to one pipe, and unbuffered Python writes a line's end apart from its text.
    assert re.findall(r"wrote (\d+)", run.stdout) == ["2", "2"]
    assert content(tmp_path / "two") == content(tmp_path / "one")
    for text in (
        "again, 0: CompletedError: .*/two is complete",
        "again, 1: CompletedError: .*/two is complete",
        "other plans, 0: RankError: rank 1 failed, .*rank was 0, is 1",
        r"other plans, 1: ValueError: .*/other/\.unfinished is of an unfinished run.*rank was 0, is 1",
    ):
        assert re.search(text, run.stdout), run.stdout
    assert [path.name for path in (tmp_path / "other").iterdir()] == [UNFINISHED]


def test_another_plan_does_not_go_on(tmp_path: Path) -> None:
    with entered(tmp_path / "out"):
        pass
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match=r"rank was 4, is 8\. To start anew, remove .*\.unfinished"):
        entered(tmp_path / "out", rank=8).__enter__()
    with pytest.raises(ValueError, match=r"another plan: [^;]*; [^;]*; [^;]*; and 2 more"):
        entered(tmp_path / "out", rank=8, a=1, b=2, c=3, d=4).__enter__()
    assert content(tmp_path / "out") == before
    assert write(tmp_path / "out") == len(batches())


@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.truncate(path, 100)])
def test_a_file_that_an_unfinished_run_lacks_is_not_made_again(change: Callable[[Path], None], tmp_path: Path) -> None:
    """Some of it may be written."""
    with entered(tmp_path / "out"):
        pass
    path = tmp_path / "out" / UNFINISHED / "files" / "model-1.safetensors"
    change(path)
    unfinished = re.escape(str(tmp_path / "out" / UNFINISHED))
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(path))} is missing or .*: remove {unfinished} to start anew"
    ):
        entered(tmp_path / "out").__enter__()


def test_a_file_of_others_is_not_taken_for_one_in_place(tmp_path: Path) -> None:
    """A run that was killed between two names finds its own files in the folder: of their size, with their header."""
    with entered(tmp_path / "out"):
        pass
    path = tmp_path / "out" / UNFINISHED / "files" / "model-1.safetensors"
    size = path.stat().st_size
    path.unlink()
    (tmp_path / "out" / path.name).write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is missing or"):
        entered(tmp_path / "out").__enter__()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_folder_in_use_is_refused(hidden: bool, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    if hidden:
        (tmp_path / UNFINISHED).mkdir()
    with pytest.raises(ValueError, match=r"is not empty \(mine\) and nothing is overwritten"):
        entered(tmp_path).__enter__()
    assert [*content(tmp_path)] == ["mine"]
    with pytest.raises(ValueError, match="mine is a file"):
        entered(tmp_path / "mine").__enter__()


def test_what_a_run_left_before_it_had_an_identity_is_not_used(tmp_path: Path) -> None:
    """Killed as it began: nobody knows any more what its files were to be."""
    left = tmp_path / "out" / UNFINISHED / "files"
    left.mkdir(parents=True)
    for name in (*FILES, "other.safetensors"):
        (left / name).parent.mkdir(exist_ok=True)
        (left / name).write_bytes(b"x" * 10_000)
    notes = left.with_name("done")
    notes.mkdir()
    for batch in batches():
        (notes / f"{batch_name(*batch)}.json").write_text("{}")
    assert write(tmp_path / "out") == len(batches())
    write(tmp_path / "new")
    assert content(tmp_path / "out") == content(tmp_path / "new")


@pytest.mark.system_calls("fcntl")
def test_one_run_at_a_time(tmp_path: Path) -> None:
    with entered(tmp_path / "out"), pytest.raises(ValueError, match=r"another run is writing to .*out: wait"):
        entered(tmp_path / "out").__enter__()


def test_a_second_run_of_a_complete_folder_says_so(tmp_path: Path) -> None:
    write(tmp_path / "out")
    before = content(tmp_path / "out")
    out = re.escape(str(tmp_path / "out"))
    with pytest.raises(CompletedError, match=f"{out} is complete since an earlier run with the same arguments"):
        entered(tmp_path / "out").__enter__()
    with pytest.raises(ValueError, match=r"is not empty .* nothing is overwritten"):
        entered(tmp_path / "out", rank=8).__enter__()
    assert content(tmp_path / "out") == before
    (tmp_path / "out" / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match="is not empty"):
        entered(tmp_path / "out").__enter__()


@pytest.mark.system_calls("fcntl", "unlinked")
def test_a_lock_that_its_run_has_removed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(file: int) -> bool:
        (tmp_path / UNFINISHED / "lock").unlink()
        return lock(file)

    monkeypatch.setattr("pissa.checkpoints.output.lock", late)
    with pytest.raises(ValueError, match="another run is writing"):
        entered(tmp_path).__enter__()


@pytest.mark.system_calls("fcntl")
def test_without_locks_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("msvcrt.locking" if sys.platform == "win32" else "fcntl.flock", fail)
    entered(tmp_path / "out").__enter__().finish()


# ---- Tensors ---------------------------------------------------------------------------------------------------------


def of(folder: Path, tensors: dict[str, Tensor]) -> Output:
    return Output(folder, IDENTITY, {"model.safetensors": layout_of(tensors)})


def test_written_in_any_order_it_is_the_file_that_was_planned(tmp_path: Path) -> None:
    tensors = tensors_of_all_dtypes() | {"transposed": torch.rand(7, 6).T}
    layout = layout_of(tensors)
    with of(tmp_path, tensors) as out:
        hidden = tmp_path / UNFINISHED / "files" / "model.safetensors"
        assert hidden.stat().st_size == layout.size
        names = list(tensors)
        random.Random(0).shuffle(names)
        for name in names:
            out.write("model.safetensors", name, tensors[name])
        out.finish()
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert opened.get_slice(name).get_shape() == list(tensor.shape)
            assert same_bits(opened.get_tensor(name), tensor)
    source = Source(tmp_path)
    assert set(source.names) == tensors.keys()
    assert all(same_bits(source.read(name), tensor) for name, tensor in tensors.items())


def test_matrices_of_a_stack_are_written_by_themselves(tmp_path: Path) -> None:
    tensors = tensors_of_all_dtypes()
    with of(tmp_path, tensors) as out:
        for member in (3, 0, 1):
            out.write("model.safetensors", "cube", tensors["cube"][member], member)
        out.finish()
    found = Source(tmp_path).read("cube")
    assert same_bits(found[[0, 1, 3]], tensors["cube"][[0, 1, 3]])
    assert not found[2].any()


@pytest.mark.parametrize(
    ("name", "tensor", "member"),
    [
        ("cube", torch.zeros(4, 3, 5), None),
        ("cube", torch.zeros(4, 3, 6).bfloat16(), None),
        ("cube", torch.zeros(4, 15).bfloat16(), None),
        ("cube", torch.zeros(3, 3, 5).bfloat16(), None),
        ("cube", torch.zeros(1, 3, 5).bfloat16(), 0),
        ("cube", torch.zeros(3, 4).bfloat16(), 0),
        ("point", torch.zeros(1), None),
    ],
)
def test_another_tensor_than_planned_is_refused(name: str, tensor: Tensor, member: int | None, tmp_path: Path) -> None:
    with of(tmp_path, tensors_of_all_dtypes()) as out:
        path = tmp_path / UNFINISHED / "files" / "model.safetensors"
        before = path.read_bytes()
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: tensor '{name}': got .*; planned: "):
            out.write("model.safetensors", name, tensor, member)
        assert path.read_bytes() == before


# ---- A full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.system_calls("posix_fallocate")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_leaves_nothing(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: Layout({"x": (torch.uint8, (3_000_000_000,))}) for name in ("a.safetensors", "b.safetensors")}
    calls = []

    def fail(handle: int, offset: int, length: int) -> None:
        calls.append(length)
        if len(calls) > 1:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    message = (
        rf"b\.safetensors cannot be written \({os.strerror(number)}\): 6 GB are needed, and [\d.]+ GB free there: make"
    )
    with pytest.raises(OSError, match=message) as caught:
        Output(tmp_path / "a" / "out", IDENTITY, files).__enter__()
    assert "\n" not in str(caught.value)
    assert [*tmp_path.iterdir()] == []


def test_a_disk_that_fails_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match=f"{re.escape(str(tmp_path / 'out'))} cannot be written: Input/output error"):
        write(tmp_path / "out")


def test_a_batch_that_cannot_be_noted_ends_the_run_at_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = Output._note

    def fails(out: Output, batch: str, result: str) -> None:
        if batch == batch_name(*batches()[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        note(out, batch, result)

    monkeypatch.setattr(Output, "_note", fails)
    with pytest.raises(OSError, match=f"{re.escape(str(tmp_path / 'out'))} cannot be written: Input/output error"):
        write(tmp_path / "out")


def test_a_disk_that_gets_full_names_the_folder(tmp_path: Path) -> None:
    folder = re.escape(str(tmp_path / "out"))
    message = f"{folder} cannot be written: {os.strerror(errno.ENOSPC)}; make room, and the same command goes on"
    with pytest.raises(OSError, match=message), entered(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of a small file
    assert write(tmp_path / "out") == len(batches())
