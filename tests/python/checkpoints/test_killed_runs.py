"""Runs that write a checkpoint: killed and begun again they write the same bytes and counts, and nothing twice; their
memory is that of a matrix. test_output.py kills the writing of any checkpoint everywhere; test_init_calibrated.py has
a run with a calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import checkpoint_folders
import pissa
from checkpoint_folders import contents, save
from interrupted import Interrupted
from language_models import moved
from live_bytes import LiveBytes
from pissa.checkpoints import rewrite
from pissa.checkpoints.init import init
from pissa.checkpoints.merge import merge
from pissa.checkpoints.output import UNFINISHED, Output
from pissa.containers.staged import CompletedError
from released_folders import FIELDS, released

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

Write = Callable[[Path], Any]
"""Writes a checkpoint to a folder, and returns what is said of it."""


def splitting(kind: str, experts: Any = "dense", **fields: Any) -> Callable[..., Write]:
    def begin(folder: Path, **sizes: Any) -> Write:
        save(kind, folder / "base", shards="100KB", **sizes)
        config = pissa.PissaConfig(r=4, **fields)
        return lambda out: init(folder / "base", out, config, experts=experts)

    return begin


def trained(folder: Path, sizes: dict[str, Any], **fields: Any) -> None:
    save("llama", folder / "base", torch.bfloat16, shards="30KB", **sizes)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    moved(pissa.wrap(model, r=4, **fields)).save_pretrained(folder / "run")


def merging(folder: Path, **sizes: Any) -> Write:
    trained(folder, sizes)
    return lambda out: merge(folder / "run", folder / "base", out)


def merging_into_codes(folder: Path, **sizes: Any) -> Write:
    released("llama", "mxfp4-compressed", folder / "base")
    moved(pissa.load(folder / "base", init="lora", **FIELDS)).save_pretrained(folder / "run")
    return lambda out: merge(folder / "run", folder / "base", out, quant="same")


def exporting(folder: Path, **sizes: Any) -> Write:
    trained(folder, sizes, quant="nf4", rank_pattern={"q_proj": 3})
    return lambda out: pissa.export(folder / "run", out, "bnb4", base=folder / "base")


RUNS: dict[str, Callable[..., Write]] = {
    "init": splitting("llama", quant="nf4"),
    "init, experts in 4 bits": splitting("mixtral", experts="nf4", quant="nf4"),
    "init, a stack of experts": splitting("gpt_oss", residual="explicit"),
    "merge": merging,
    "merge into codes": merging_into_codes,
    "export to bitsandbytes": exporting,
}


@pytest.mark.parametrize("run", RUNS)
def test_it_goes_on_to_the_same_bytes(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "BATCH", 1)
    write, out = RUNS[run](tmp_path), tmp_path / "out"
    add = Interrupted(Output.add, at=0)
    monkeypatch.setattr(Output, "add", lambda *args: add(*args))
    whole, expected = write(out), contents(out)
    out.rename(tmp_path / "whole")
    batches, add.at, add.calls = add.calls, add.calls - 1, 0
    assert batches > 3
    with pytest.raises(KeyboardInterrupt):
        write(out)
    assert [path.name for path in out.iterdir()] == [UNFINISHED]
    assert write(out) == whole
    assert add.calls == batches + 1  # that which was interrupted; none is done twice
    assert contents(out) == expected
    with pytest.raises(CompletedError, match="out is complete"):
        write(out)


@pytest.mark.parametrize("run", ["merge", "export to bitsandbytes"])
def test_memory_is_that_of_a_matrix(run: str, tmp_path: Path) -> None:
    """However many layers there are."""
    peaks = []
    for layers in (1, 3):
        write = RUNS[run](tmp_path / str(layers), num_hidden_layers=layers)
        with LiveBytes() as memory:
            write(tmp_path / str(layers) / "out")
        peaks.append(memory.peak)
    # In float32 the weight and its change or residual; what is written; factors, which are small. The first run makes
    # maps of codes.
    largest = checkpoint_folders.SIZES["hidden_size"] * checkpoint_folders.SIZES["intermediate_size"]
    assert peaks[1] <= peaks[0] <= 14 * largest
