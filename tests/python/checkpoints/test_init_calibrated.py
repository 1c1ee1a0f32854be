"""`init` with a calibration: the folder is what `wrap` makes in memory, in any order of the layers in the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import pissa
from checkpoint_folders import contents, save
from pissa.checkpoints.init import init
from pissa.checkpoints.merge import merge
from pissa.checkpoints.output import UNFINISHED
from pissa.cli import main
from pissa.layers.layer import pissa_layers
from pissa.model.calibrate import BlockMoments
from tiny_model import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

METHODS: dict[str, dict[str, Any]] = {
    "activations": {"init": "activations"},
    "feedback": {"init": "lora", "error_feedback": True},
    "both": {"init": "activations", "error_feedback": True, "quant_iters": 2},
}


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 40, (2, 12 + number), generator=generator) for number in range(4)]


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batches()[0]).logits


@pytest.mark.parametrize("method", METHODS)
def test_as_wrap_does(method: str, tmp_path: Path) -> None:
    """Bit for bit: the codes, the start, and so what the model computes, from twelve blocks in one file."""
    base = tmp_path / "base"
    save("llama", base, num_hidden_layers=12)
    config = pissa.PissaConfig(r=4, quant="nf4", task_type="CAUSAL_LM", **METHODS[method])
    init(base, tmp_path / "split", config, calibration=batches())
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    wrapped = pissa.wrap(model, config, calibration=batches())
    loaded = pissa.load(tmp_path / "split")
    for layer, other in zip(*(pissa_layers(each.base_model.model).values() for each in (wrapped, loaded)), strict=True):
        for part, same in zip(layer.base.residual[:4], other.base.residual[:4], strict=True):
            assert torch.equal(part, same)
    assert torch.equal(outputs(loaded), outputs(wrapped))


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with the moments of one block in memory: those of the layers that were written are not wanted again."""
    from pissa.checkpoints import rewrite

    waiting, of = [0], BlockMoments.of

    def counted(moments: BlockMoments, *args: Any) -> list[Tensor]:
        found = of(moments, *args)
        waiting.append(len(found) + len(moments._waiting))
        return found

    monkeypatch.setattr(BlockMoments, "of", counted)
    base = tmp_path / "base"
    save("llama", base, num_hidden_layers=12)
    config = pissa.PissaConfig(r=4, quant="nf4", **METHODS["both"])
    init(base, tmp_path / "whole", config, calibration=batches())
    monkeypatch.setattr(rewrite, "BATCH", 1 << 12)
    write, calls = rewrite.Output.write, [0]

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] == 150:
            raise KeyboardInterrupt
        write(self, *args, **kwargs)

    monkeypatch.setattr(rewrite.Output, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        init(base, tmp_path / "split", config, calibration=batches())
    with pytest.raises(ValueError, match="calibration"):
        init(base, tmp_path / "split", config, calibration=batches()[1:])
    assert any((tmp_path / "split" / UNFINISHED / "done").iterdir())
    waiting.clear()
    init(base, tmp_path / "split", config, calibration=batches())
    assert max(waiting) == 7
    found = {name: content.replace(b"split", b"whole") for name, content in contents(tmp_path / "split").items()}
    assert found == contents(tmp_path / "whole")


def test_an_adapter_on_such_a_checkpoint_needs_no_codes(tmp_path: Path) -> None:
    """And is merged, or loaded, with that checkpoint alone."""
    base = tmp_path / "base"
    save("llama", base)
    config = pissa.PissaConfig(r=4, quant="nf4", task_type="CAUSAL_LM", **METHODS["feedback"])
    init(base, tmp_path / "split", config, calibration=batches())
    model = pissa.load(tmp_path / "split")
    with torch.no_grad():
        for layer in pissa_layers(model.base_model.model).values():
            layer.lora_B["default"].weight.normal_(std=0.02)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "run")
    assert sum(path.stat().st_size for path in (tmp_path / "run").iterdir()) < 600_000
    assert torch.equal(outputs(pissa.load(tmp_path / "split", adapter=tmp_path / "run")), expected)
    merge(tmp_path / "run", tmp_path / "split", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    torch.testing.assert_close(outputs(merged), expected, atol=1e-4, rtol=1e-4)
    dense = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with pytest.raises(ValueError, match=r"were found by error feedback, and .* does not have them"):
        pissa.PissaModel.from_pretrained(dense, tmp_path / "run")
    with pytest.raises(ValueError, match=r"were found by error feedback, and .* does not have them"):
        merge(tmp_path / "run", base, tmp_path / "again")


@pytest.mark.parametrize("quant", ["mxfp4", "fp8"])
def test_a_format_that_only_pissa_reads_is_no_checkpoint_s(quant: str, tmp_path: Path) -> None:
    save("llama", tmp_path / "base")
    with pytest.raises(ValueError, match=f"quant: got '{quant}', whose bytes only pissa reads"):
        init(tmp_path / "base", tmp_path / "split", pissa.PissaConfig(r=4, quant=quant))
    assert not (tmp_path / "split").exists()


def test_by_the_command_line(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    records = [{"question": f"{number} + 1?", "answer": f"{number + 1}"} for number in range(5)]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    arguments = ["--quant", "nf4", "--init", "lora", "--calibration", str(tmp_path / "train.jsonl"), "--examples", "4"]
    assert main(["init", str(base), str(tmp_path / "out"), *arguments]) == 0
    loaded = pissa.load(tmp_path / "out")
    assert loaded.peft_config["default"].error_feedback
