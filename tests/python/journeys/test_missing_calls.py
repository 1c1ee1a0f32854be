"""Checkpoints on systems that lack a call: an interrupted run is continued, and the files have the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import missing_calls
from checkpoint_writer import IDENTITY, batches, content, layouts, tensors, write, write_batch
from pissa.checkpoints.output import Output
from pissa.cli.env import environment
from pissa.cli.memory import peak_memory
from pissa.containers.staged import staged
from pissa.containers.tensor_file import Scratch, Source, write_tensors

AT_ONCE = {"macOS": missing_calls.MACOS, "all": missing_calls.CALLS}


@pytest.mark.parametrize("missing", [*missing_calls.CALLS, *AT_ONCE])
def test_a_checkpoint_is_written_and_read(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "with all calls")
    missing_calls.take_away(AT_ONCE.get(missing, (missing,)), monkeypatch)
    folder = tmp_path / "out"
    with Output(folder, IDENTITY, layouts()) as out:  # and not finished
        write_batch(out, *batches()[0])
    assert write(folder) == len(batches()) - 1
    assert content(folder) == content(tmp_path / "with all calls")

    expected = {**tensors("model-1.safetensors"), "of some pages": torch.ones(5000)}
    with Scratch(folder) as scratch, staged(folder) as new:
        scratch.put({"bias": expected["bias"]})
        write_tensors(new("model.safetensors"), {**expected, **scratch})
    source = Source(folder)
    for _ in range(2):
        source.ahead(source.names)
        assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())
        source.release(source.names)
    assert peak_memory() > 10**7
    assert environment()["cores"].endswith("of them busy" if hasattr(os, "getloadavg") else str(os.cpu_count()))
