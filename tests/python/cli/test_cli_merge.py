"""`pissa merge`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from language_models import train
from pissa.cli import main
from runs import refused
from tiny_model import save_tiny_model


def test_a_model_of_its_own(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(adapter), "--base", str(base), str(out)]) == 0
    captured = capsys.readouterr()
    assert f"adapter   {adapter}: an adapter of pissa, 14 layers\n" in captured.out
    assert "error     dense, rounded once: 0.000% of the weights' norm, 0.000% of the change's\n" in captured.out
    assert f"saved     {out}: " in captured.out
    assert "PiSSA merge: 100%" in captured.err


def test_codes_and_json(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["merge", str(adapter), "--base", str(base), "--quant", "nf4"]
    assert main([*options, str(tmp_path / "a"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"] == report["quantised"] == 14
    assert report["what"] == "an adapter of pissa"
    assert 0.01 < report["error"] < 0.2
    assert main([*options, str(tmp_path / "b")]) == 0
    line = (
        f"14 layers in nf4: {report['error']:.3%} of the weights' norm, {report['error_of_change']:.3%} of the change's"
    )
    assert f"error     {line}\n" in capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj.weight.absmax" in load_file(tmp_path / "a" / "model.safetensors")


@pytest.mark.parametrize(("kind", "quant"), [("peft", None), ("ours", "int8"), ("peft", "nf4")])
def test_losses_are_compared_whoever_wrote_the_adapter_and_again(
    kind: str,
    quant: str | None,
    base: Path,
    adapter: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if kind == "peft":
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
        train(model, torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(adapter := tmp_path / "lora")
    options = ["merge", str(adapter), str(tmp_path / "out"), "--base", str(base), "--data", str(data), "--json"]
    reports = []
    for _ in range(2):
        assert main([*options, *(["--quant", quant] if quant else [])]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    first, again = (report["loss"] for report in reports)
    assert again == first
    assert (reports[0]["layers"], reports[1].get("layers")) == (14, None)
    assert first["base"] != first["adapter"]
    assert abs(first["merged"] - first["adapter"]) < (0.1 if quant else 1e-4)
    assert main([*options[:-1], *(["--quant", quant] if quant else [])]) == 0
    note, losses = capsys.readouterr().out.splitlines()
    assert note == f"note      {tmp_path}/out is complete since an earlier run with the same arguments; {note[-25:]}"
    assert losses.startswith(f"loss      base {first['base']:.4f}, adapter {first['adapter']:.4f}, merged ")


def test_what_cannot_be_compared_is_not_merged(
    base: Path, adapter: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(base), str(tmp_path / "split"), "--rank", "4"]) == 0
    out, compared = tmp_path / "out", ["--data", str(data)]
    initial = str(tmp_path / "split" / "pissa_init")
    message = refused(["merge", initial, str(out), "--base", str(tmp_path / "split"), *compared], capsys)
    assert message.endswith("was trained on a residual, which is not the base; run pissa convert first [P114]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pissa.cli.folders.find_spec", lambda name: None)
        message = refused(["merge", str(adapter), str(out), "--base", str(base), "--quant", "int8", *compared], capsys)
        assert "only bitsandbytes computes in int8; run `pip install bitsandbytes`" in message
    assert not out.exists()


def test_nothing_is_measured_for_what_cannot_be_merged(
    base: Path,
    adapter: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("the base was loaded")

    other = save_tiny_model(tmp_path / "other", intermediate_size=48)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    unfinished = tmp_path / "unfinished" / ".unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "identity.json").write_text('{"command": "init"}')
    monkeypatch.setattr("pissa.cli.held_out.losses_before", measured)
    for of, out, options, words in (
        (base, "out", ["--quant", "same"], "contains weights in 16 or 32 bits: leave it out"),
        (other, "out", [], "it is not the base of the adapter [P092]"),
        (base, "full", [], "full is not empty (file) and nothing is overwritten"),
        (base, "unfinished", [], "is of an unfinished run with another plan: command was 'init', is 'merge'"),
    ):
        merge = ["merge", str(adapter), str(tmp_path / out), "--base", str(of), "--data", str(data), *options]
        assert words in refused(merge, capsys)
    assert not (tmp_path / "out").exists()
