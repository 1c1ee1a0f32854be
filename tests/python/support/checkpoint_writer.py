"""A run that writes a small checkpoint, as a test, in several processes, and killed wherever a kill leaves something.

python checkpoint_writer.py kill FOLDER EVERY   the run, killed at its first call that changes the disk, and finished
                                                by another; then EVERY calls later; and so on
torchrun checkpoint_writer.py share FOLDER      the run on all ranks
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa.checkpoints.output import FINISHED, Output
from pissa.containers.staged import CompletedError
from pissa.containers.tensor_file import DTYPES, Layout
from pissa.distributed import RankError, agree, failing_together

IDENTITY: dict[str, Any] = {"version": "1", "rank": 4, "source": {"a.safetensors": "12 bytes"}}
FILES = {"model-1.safetensors": 3, "model-2.safetensors": 1, "adapter/adapter_model.safetensors": 1}
"""The number of tensors in each."""
SMALL = {"config.json": "{}", "tokenizer.json": "[]", "adapter/adapter_config.json": "{}"}


def tensors(file: str) -> dict[str, Tensor]:
    """The tensors of a file: of several dtypes, and one whose bytes are not in order."""
    dice = torch.Generator().manual_seed(FILES[file])
    found = {
        "codes": torch.randint(0, 256, (37,), generator=dice).to(torch.uint8),
        "bias": torch.randn(5, generator=dice).to(torch.bfloat16),
        "weight": torch.randn(7, 5, generator=dice).T,
    }
    return dict([*found.items()][: FILES[file]])


def tensors_of_all_dtypes() -> dict[str, Tensor]:
    """Of odd sizes and all kinds of shapes, in an order that is neither that of the file nor that of their names."""
    bits = torch.randint(0, 2, (3 * 8,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = {f"{i % 3}{name} ü": bits.view(dtype).clone() for i, (name, dtype) in enumerate(DTYPES.items())}
    shapes = {"point": (), "empty": (0, 3), "z": (5,), "a": (1, 3)}
    found |= {name: torch.full(shape, 1.5) for name, shape in shapes.items()}
    return found | {"cube": torch.rand(4, 3, 5).bfloat16()}


def layout_of(tensors: dict[str, Tensor]) -> Layout:
    return Layout({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """For every dtype."""
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected)]
    return (found.dtype, found.shape) == (expected.dtype, expected.shape) and torch.equal(*bits)


def layouts() -> dict[str, Layout]:
    return {file: layout_of(tensors(file)) for file in FILES}


def batches() -> list[tuple[str, str]]:
    """The file and the tensor of each batch."""
    return [(file, name) for file in FILES for name in tensors(file)]


def write(folder: Path, rank: int = 0, ranks: int = 1) -> int:
    """The whole run; the number of batches that it had to write."""
    with failing_together(), Output(folder, IDENTITY, layouts()) as out:
        mine = [batch for batch in batches()[rank::ranks] if batch_name(*batch) not in out.done]
        for file, name in mine:
            write_batch(out, file, name)
        assert {batch for done in agree(out.done) for batch in done} == {batch_name(*batch) for batch in batches()}
        if rank == 0:
            for small, text in SMALL.items():
                out.path(small).write_text(text)
        out.finish()
    return len(mine)


def batch_name(file: str, name: str) -> str:
    return f"{batches().index((file, name)):06}"


def write_batch(out: Output, file: str, name: str) -> None:
    out.write(file, name, tensors(file)[name])
    out.add(batch_name(file, name), {name: float(tensors(file)[name].sum())})


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of all files below the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


CALLS = ("open", "write", "ftruncate", "posix_fallocate", "fsync", "fdatasync", "replace", "mkdir", "unlink", "rmdir")


def kill_at(last: int) -> None:
    """Kills this process at its call of that number; what is being written is then half written."""
    made = 0

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made == last:
                if name == "write":
                    call(args[0], memoryview(args[1])[: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return run

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


def in_a_child(run: Callable[[], int]) -> int:
    """What `run` returns in a process of its own, or minus the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 255
        try:
            code = run()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def noted(folder: Path) -> int:
    """The batches that are noted in the folder."""
    return len([*folder.glob(".unfinished/done/*.json")])


def killed(folder: Path, last: int) -> int:
    kill_at(last)
    return write(folder)


def kill_everywhere(scratch: Path, every: int) -> None:
    whole = scratch / "whole"
    assert in_a_child(lambda: write(whole)) == len(batches())
    expected = content(whole)
    assert sorted(expected) == sorted([*FILES, *SMALL, FINISHED])
    kills = resumed = 0
    for last in itertools.count(1, every):
        folder = scratch / "killed"
        code = in_a_child(lambda last=last, folder=folder: killed(folder, last))
        found = {name: data for name, data in content(folder).items() if ".unfinished" not in name}
        assert all(data == expected[name] for name, data in found.items()), f"kill {last}: half a file in place"
        placed = expected.keys() - {FINISHED}
        assert "config.json" not in found or found.keys() >= placed, f"kill {last}: config.json too early"
        if code >= 0:
            assert found == expected
            break
        assert code == -signal.SIGKILL
        kills += 1
        before = noted(folder)
        if found != expected or (folder / ".unfinished/identity.json").exists():
            again = in_a_child(lambda folder=folder: write(folder))
            assert again == len(batches()) - before, f"kill {last}: {again} batches again, {before} were noted"
            assert content(folder) == expected, f"kill {last}: other bytes"
            resumed += before > 0
        else:  # all is in place; another run says so, and removes what is left of the hidden folder
            assert in_a_child(lambda folder=folder: "CompletedError" in refused(folder)) == 1
            assert content(folder) == expected
        shutil.rmtree(folder)
    print(json.dumps({"kills": kills, "resumed": resumed}))


def refused(folder: Path, rank: int = 0, ranks: int = 1) -> str:
    """The error of a run."""
    try:
        write(folder, rank, ranks)
    except (CompletedError, ValueError, RankError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "kill":
        os.fsync = os.fdatasync = lambda handle: None  # a kill leaves all to the system, and disks are slow
        kill_everywhere(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        torch.distributed.init_process_group("gloo")
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        folder = Path(sys.argv[2])
        print(f"wrote {write(folder, rank, ranks)}")
        print(f"again, {rank}: {refused(folder, rank, ranks)}")
        IDENTITY["rank"] = rank
        print(f"other plans, {rank}: {refused(folder.with_name('other'), rank, ranks)}")
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
