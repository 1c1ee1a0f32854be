"""A file system that fails once does not undo what a run has done."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Callable
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

import pissa
from checkpoint_folders import contents
from language_models import train
from pissa.checkpoints import rewrite
from pissa.checkpoints.init import init as run
from pissa.checkpoints.output import UNFINISHED
from pissa.cli import main
from pissa.containers import coded_weights
from released_folders import released
from runs import command, refused


def done(out: Path) -> int:
    """The batches that an unfinished run has noted."""
    return len([*(out / UNFINISHED / "done").glob("*.json")])


class FailsOnce:
    """`os.stat`, which fails once for the weights of a model: when a run has noted a few batches."""

    def __init__(self, weights: Path, out: Path) -> None:
        self.weights, self.out, self.real = weights, out, os.stat
        self.failed_after = 0

    def __call__(self, path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if not self.failed_after and str(path) == str(self.weights) and (noted := done(self.out)) >= 3:
            self.failed_after = noted
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return self.real(path, *args, **kwargs)


def init(base: Path, tokens: Tensor, tmp_path: Path) -> list[str]:
    return ["init", str(base), str(tmp_path / "out"), "--rank", "4", "--quant", "nf4"]


def merge(base: Path, tokens: Tensor, tmp_path: Path) -> list[str]:
    model = pissa.wrap(AutoModelForCausalLM.from_pretrained(base), r=4)
    train(model, tokens)
    model.save_pretrained(tmp_path / "run")
    return ["merge", str(tmp_path / "run"), str(tmp_path / "out"), "--base", str(base)]


@pytest.mark.parametrize("arguments_of", [init, merge])
def test_a_run_that_fails_to_read_goes_on(
    arguments_of: Callable[[Path, Tensor, Path], list[str]],
    base: Path,
    tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(rewrite, "BATCH", 1)
    arguments, out = arguments_of(base, tokens, tmp_path), tmp_path / "out"
    assert main(arguments) == 0
    expected = contents(out)
    out.rename(tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat := FailsOnce(base / "model.safetensors", out))
        capsys.readouterr()
        assert main(arguments) == 2
    assert done(out) >= stat.failed_after >= 3
    assert os.strerror(errno.ESTALE) in (message := capsys.readouterr().err)
    assert re.search("goes on|again", message)
    assert main(arguments) == 0
    assert contents(out) == expected


FULL = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
"""What torch.save raises on a full disk."""


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        ("torch.save", FULL, f"OUT cannot be written: {FULL}; "),
        ("torch.save", OSError(errno.ENOSPC, "No space left"), "OUT cannot be written: No space left; "),
        ("pissa.adapters.save.write_tensors", OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.b"), "a.b cannot be"),
        ("pissa.adapters.save.write_tensors", SafetensorError("I/O error: full (os error 28)"), "I/O error: full"),
    ],
)
def test_a_training_that_cannot_save_keeps_its_last_checkpoint(
    place: str,
    error: Exception,
    said: str,
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = command("finetune", base, data, out := Path("a run"), "--rank", "2", "--save-steps", "1", steps=2)
    real = resolve_name(place)

    def fails(*args: Any, **options: Any) -> Any:
        if (out / "checkpoint-1" / "trainer_state.json").is_file():
            raise error
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, fails)
        message = refused(arguments, capsys)
    assert said.replace("OUT", str(out)) in message
    assert "the last complete checkpoint, a run/checkpoint-1, is kept; " in message
    assert ("`ulimit -n 4096`" if "a.b" in said else "free there; free some space") in message
    assert main(shlex.split(message.partition("then go on by: pissa ")[2])) == 0
    assert "resume    from a run/checkpoint-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [MemoryError("none left"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_run_that_is_short_of_memory_goes_on(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for a damaged file, and what has been done is kept."""
    monkeypatch.setattr(rewrite, "BATCH", 1)
    released("llama", "fp8-tiles", base := tmp_path / "base")
    config, out, real, calls = pissa.PissaConfig(r=4), tmp_path / "out", coded_weights.released_weight, count(1)
    run(base, out, config)
    expected = contents(out)
    out.rename(tmp_path / "undisturbed")

    def once(parts: Any) -> Any:
        if next(calls) == 9:
            raise error
        return real(parts)

    monkeypatch.setattr(coded_weights, "released_weight", once)
    with pytest.raises(type(error), match=str(error)):
        run(base, out, config)
    assert done(out) >= 3
    run(base, out, config)
    assert contents(out) == expected
