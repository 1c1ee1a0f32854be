"""`pissa init`: what it prints, writes and refuses, in one process and in several."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

from checkpoint_folders import contents, save
from pissa.checkpoints import rewrite
from pissa.checkpoints.output import UNFINISHED, Output
from pissa.cli import main
from processes import launch
from runs import refused


def test_what_it_says_and_writes(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["init", str(base), str(out), "--quant", "int8", "--rank", "4", "--alpha", "8"]) == 0
    captured = capsys.readouterr()
    assert f"split     {base}: 14 layers, rank 4, residual int8, start pissa\n" in captured.out
    assert re.search(r"^error     0\.\d+% of the weights' norm", captured.out, re.MULTILINE)
    assert re.search(rf"^saved     {out}: \d+ kB, the adapter in pissa_init$", captured.out, re.MULTILINE)
    assert "pissa.load(" in captured.out
    assert str(out / "pissa_init") in captured.out
    assert "PiSSA init: 100%" in captured.err
    config = json.loads((out / "pissa_init" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(base))


def test_json(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(base), str(tmp_path / "out"), "--memory", "1kB", "--rank", "40", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"] == 14
    assert "r=40 is more than the smaller side" in report["notes"][0]


def test_notes_come_before_the_work(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(base), str(tmp_path / "out"), "--memory", "1kB", "--rank", "40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("note ")] == lines[:1]
    assert "r=40 is more than the smaller side" in lines[0]


def test_experts_in_a_format_are_for_pissa_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("mixtral", tmp_path / "src")
    arguments = ["--quant", "int8", "--experts", "int8", "--rank", "2"]
    assert main(["init", str(tmp_path / "src"), str(tmp_path / "out"), *arguments]) == 0
    assert "no other program reads experts in int8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "40", "--target-modules", "k_proj"], "rank 40 is too large for layer model.layers.0.self_attn.k"),
        (["--init", "loftq"], "init: got 'loftq'; allowed: 'pissa', 'lora', 'activations'"),
        (["--calibration", "train.jsonl"], "--calibration: needs --quant, whose codes it chooses; give --quant nf4"),
        (["--init", "activations", "--quant", "nf4"], "--init activations: got no --calibration; give --calibration"),
        (["--experts", "nf4"], "experts: got 'nf4'; allowed: 'dense', or"),
        (["--target-modules", "nothing"], "nothing"),
    ],
)
def test_refusals(
    options: list[str], message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["init", str(base), str(tmp_path / "out"), *options], capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["init", "none/such", str(tmp_path / "out")], capsys)
    assert "'none/such' is not a model: there is no such folder" in message


def test_a_model_of_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched without the weights in other formats, or for other programs, or under other names."""
    snapshot = tmp_path / "0123abcd"
    snapshot.mkdir()
    hidden = {"original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "model.gguf"}
    asked = []

    def download(
        name: str, allow_patterns: list[str], ignore_patterns: list[str] | None = None, revision: str | None = None
    ) -> str:
        files = [*(path.name for path in base.iterdir()), *hidden]
        fetched = set(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert not fetched & hidden
        for file in fetched:
            shutil.copy(base / file, snapshot / file)
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert main(["init", "some/model", str(tmp_path / "out"), "--rank", "4"]) == 0
    assert asked == [("some/model", None), ("some/model", "0123abcd")]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("options", [["--memory", "2 apples"], ["--memory", "0"], ["--rank", "0"], ["--quant", "nf3"]])
def test_wrong_arguments(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(r"allowed|invalid choice", refused(["init", "a", "b", *options], capsys))


def test_an_interrupted_run_goes_on(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "BATCH", 1)
    arguments = ["init", str(base), str(tmp_path / "out"), "--rank", "4"]
    add, left = Output.add, [5]

    def interrupted(*args: object) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        add(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Output, "add", interrupted)
        assert main(arguments) == 130
    assert "pissa init: interrupted; the same command goes on with it\n" in capsys.readouterr().err
    assert main([*arguments[:-1], "8"]) == 2
    assert "r was 4, is 8" in capsys.readouterr().err
    assert main(arguments) == 0
    assert not re.search(r"PiSSA init: +0%", capsys.readouterr().err)  # its bar begins where the other ended
    before = contents(tmp_path / "out")
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert f"\npissa init: {tmp_path}/out is complete since an earlier run" in f"\n{err}"
    assert err.endswith("; nothing is written [P080]\n")
    assert main([*arguments[:-1], "8"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


# ---- Several processes -----------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], dict[str, bytes]]:
    """The arguments for a mixture of experts in shards, and what one process makes of it."""
    monkeypatch.setattr(rewrite, "BATCH", 20_000)
    save("mixtral", tmp_path / "src", torch.bfloat16, shards="100KB")
    arguments = [str(tmp_path / "src"), str(tmp_path / "out"), "--quant", "nf4", "--rank", "4"]
    assert main(["init", *arguments]) == 0
    found = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "alone")
    return arguments, found


@pytest.mark.nightly
def test_several_processes_write_the_same_bytes(alone: tuple[list[str], dict[str, bytes]], tmp_path: Path) -> None:
    arguments, expected = alone
    done = launch(3, "init_worker.py", "none", "0", *arguments)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("split     ") == 1
    assert contents(tmp_path / "out") == expected


@pytest.mark.nightly
def test_a_process_that_dies_ends_the_others(alone: tuple[list[str], dict[str, bytes]], tmp_path: Path) -> None:
    """What both have done is not done again."""
    arguments, expected = alone
    done = launch(2, "init_worker.py", "1", "20", *arguments)
    assert done.returncode != 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [UNFINISHED]
    assert main(["init", *arguments, "--json"]) == 0
    assert contents(tmp_path / "out") == expected
