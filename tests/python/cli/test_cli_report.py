"""`pissa report`: what it prints and refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa.cli import main
from runs import refused


def test_tables(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(base), "--quant", "nf4", "--rank", "4", "8"]) == 0
    captured = capsys.readouterr()
    out = captured.out
    assert max(map(len, out.splitlines())) <= 120
    weights = load_file(base / "model.safetensors")
    ups = [w.double() for name, w in weights.items() if "up_proj" in name]
    kept = sum(float(torch.linalg.svdvals(w)[:4].square().sum()) for w in ups)
    energy = 100 * kept / sum(float(w.square().sum()) for w in ups)
    row = re.search(r"^mlp\.up_proj +2 +([\d.]+)% +([\d.]+)%$", out, flags=re.MULTILINE)
    assert row is not None
    assert float(row[1]) == pytest.approx(energy, abs=0.2)
    assert float(row[2]) > float(row[1])
    for step in (r"a step at rank 4, 1 x 512 tokens", "with gradient checkpointing"):
        sizes = r": about \d\S* .B \(weights \d\S* .B, adapter and AdamW \d\S* .B, activations \d\S* .B\)$"
        assert re.search(rf"^memory    {step}{sizes}", out, flags=re.MULTILINE)
    assert "Traceback" not in captured.err
    assert "100%" in captured.err


EXPECTED: dict[str, Any] = {
    "model": str,
    "quant": str,
    "ranks": list,
    "parameters": int,
    "kinds": dict,
    "memory": {
        "batch": int,
        "length": int,
        "rank": int,
        **{
            name: dict.fromkeys(("weights", "start", "trained", "gradients", "optimizer", "activations", "total"), int)
            for name in ("plain", "checkpointing")
        },
    },
}
KIND = {"layers": int, "energy": {"4": float, "8": float}}


def check(value: Any, expected: Any, where: str = "report") -> None:
    if isinstance(expected, dict):
        assert list(value) == list(expected), where
        for key, inner in expected.items():
            check(value[key], inner, f"{where}.{key}")
    else:
        assert type(value) is expected, where


def test_json(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(base), "--quant", "nf4", "--rank", "8", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("notes") == []
    check(found, EXPECTED)
    assert (found["model"], found["quant"], found["ranks"]) == (str(base), "nf4", [4, 8])
    for kind, some in found["kinds"].items():
        check(some, KIND, kind)
    assert {kind: some["layers"] for kind, some in found["kinds"].items()} == dict.fromkeys(
        [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))], 2
    ) | {"all": 14}


@pytest.mark.parametrize("quant", ["int8", "nf3"])
def test_the_format_changes_the_memory_only(quant: str, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for options in ([], ["--quant", quant]):
        assert main(["report", str(base), "--rank", "4", "--json", *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
    dense, coded = found
    assert coded["memory"]["plain"]["weights"] < dense["memory"]["plain"]["weights"]
    assert coded["memory"]["plain"]["activations"] == dense["memory"]["plain"]["activations"]
    assert coded["kinds"] == dense["kinds"]


def test_a_model_of_the_hub(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(base))
    assert main(["report", "some/model", "--rank", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "some/model"


def test_refusals(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere' is not a model: there is no such folder" in refused(["report", str(tmp_path / "nowhere")], capsys)

    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    folder = shutil.copytree(base, tmp_path / "nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(["report", str(folder)], capsys)
    assert "layer 'model.layers.1.mlp.up_proj': weight: " in message

    assert "quant: got 'int5'; allowed: None, 'nf4', " in refused(["report", str(base), "--quant", "int5"], capsys)
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(base), "--rank", "0"])
    capsys.readouterr()
