"""wrap(weights=): a model that bitsandbytes has quantised, repaired from the checkpoint that it was loaded from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import pissa

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
REPAIR: dict[str, Any] = {"r": 4, "init": "lora", "repair": "activations"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16().save_pretrained(path)
    return path


def in_4_bits(folder: Path, **options: Any) -> nn.Module:
    config = BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **options})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


def dense(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def batches() -> list[Tensor]:
    return list(torch.randint(0, 64, (4, 2, 24), generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=batches()[0]).logits.float()


def of_layer(model: nn.Module, name: str = "model.layers.1.mlp.up_proj") -> Any:
    return model.base_model.model.get_submodule(name)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("repair", ["activations", "loftq"])
def test_the_repair_is_that_of_the_dense_model_on_bitsandbytes_codes(folder: Path, repair: str, nested: bool) -> None:
    calibration = pissa.calibrate(dense(folder), batches()) if repair == "activations" else None
    model = in_4_bits(folder, bnb_4bit_use_double_quant=nested)
    before = {name: value.clone() for name, value in model.state_dict().items() if "proj" in name}
    fields = REPAIR | {"repair": repair}
    found = pissa.wrap(model, **fields, weights=folder, calibration=calibration)
    expected = pissa.wrap(dense(folder), **fields, quant="nf4", double_quant=nested, calibration=calibration)
    one, other = of_layer(found), of_layer(expected)
    assert found.peft_config["default"].form == expected.peft_config["default"].form == one.base.form
    assert torch.equal(one.base.quantized.codes, before["model.layers.1.mlp.up_proj.weight"].flatten())
    # The same error of the weight, once as float32 and once as bfloat16, from which the split starts there.
    product, same = (each.base.start.b0 @ each.base.start.a0 for each in (one, other))
    assert (product - same).norm() < 0.01 * same.norm()
    assert (logits(found) - logits(expected)).norm() < 0.01 * logits(expected).norm()
    exact = logits(dense(folder))
    assert (logits(found) - exact).norm() < (logits(in_4_bits(folder)) - exact).norm()


def test_saved_and_loaded_onto_either_model(folder: Path, tmp_path: Path) -> None:
    model = pissa.wrap(in_4_bits(folder), **REPAIR, weights=folder, calibration=batches())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "pissa_codes.safetensors").exists()
    for base in (in_4_bits(folder), dense(folder)):
        assert torch.equal(logits(pissa.PissaModel.from_pretrained(base, tmp_path)), expected)


def test_other_codes_are_not_those_of_the_training(folder: Path, tmp_path: Path) -> None:
    pissa.wrap(in_4_bits(folder), **REPAIR, weights=folder, calibration=batches()).save_pretrained(tmp_path)
    other = in_4_bits(folder, bnb_4bit_use_double_quant=True)
    error = (
        r"codes in nf4 \(blocksize 64, double_quant False\), .* others for layer .* in nf4 \(.* True\)\. Load the model"
    )
    with pytest.raises(ValueError, match=error):
        pissa.PissaModel.from_pretrained(other, tmp_path)


def test_a_model_without_its_head(folder: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModel.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    wrapped = pissa.wrap(model, **REPAIR, weights=folder, calibration=batches())
    whole = pissa.wrap(in_4_bits(folder), **REPAIR, weights=folder, calibration=batches())
    one, other = of_layer(wrapped, "layers.1.mlp.up_proj"), of_layer(whole)
    assert torch.equal(one.base.start.a0, other.base.start.a0)


def test_a_config_says_how_the_codes_are(folder: Path) -> None:
    fields = {"weights": folder, "calibration": batches()}
    config = pissa.PissaConfig(**REPAIR, quant="nf4", double_quant=False)
    assert of_layer(pissa.wrap(in_4_bits(folder), config, **fields)).base.form == config.form
    with pytest.raises(ValueError, match="double_quant: got True, but bitsandbytes has quantised the model with False"):
        pissa.wrap(in_4_bits(folder), pissa.PissaConfig(**REPAIR, quant="nf4"), **fields)
    with pytest.raises(
        ValueError, match="weights: got a checkpoint, but bitsandbytes has quantised it as fp4; load the"
    ):
        pissa.wrap(in_4_bits(folder, bnb_4bit_quant_type="fp4"), **REPAIR, **fields)
    embedding = {"target_modules": ["embed_tokens", "q_proj"], "init": "activations"}
    with pytest.raises(ValueError, match=r"calibration: has no layer model\.embed_tokens; leave it out"):
        pissa.wrap(in_4_bits(folder), r=4, **embedding, **fields)


def test_layers_that_bitsandbytes_leaves_keep_their_bases(folder: Path) -> None:
    model = in_4_bits(folder, llm_int8_skip_modules=["up_proj", "lm_head"])
    wrapped = pissa.wrap(model, **REPAIR, weights=folder, calibration=batches())
    assert of_layer(wrapped).base.form.name == "implicit"
    assert of_layer(wrapped, "model.layers.1.mlp.down_proj").base.form.name == "nf4"
    out = wrapped(input_ids=batches()[0], labels=batches()[0])
    out.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in wrapped.parameters() if p.requires_grad)


def test_layers_beside_the_adapter_are_not_repacked(folder: Path) -> None:
    """By bitsandbytes in evaluation mode, on a CPU: they would return no gradient."""
    model = in_4_bits(folder)
    before = model.model.layers[1].mlp.up_proj.weight.data.clone()
    wrapped = pissa.wrap(model, **REPAIR, target_modules=["q_proj"], weights=folder, calibration=batches())
    assert torch.equal(of_layer(wrapped).weight.data, before)
    assert not of_layer(wrapped).training


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"repair": "pissa"}, "weights: got a checkpoint with repair='pissa', quant_iters=1, error_feedback=False"),
        ({"quant_iters": 5}, "weights: got a checkpoint with repair='activations', quant_iters=5"),
        ({"error_feedback": True}, "weights: got a checkpoint with .*error_feedback=True"),
        ({"calibration": None}, "calibration: got None"),
    ],
)
def test_what_would_change_codes_is_refused(folder: Path, fields: dict[str, Any], error: str) -> None:
    model = in_4_bits(folder)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=error):
        pissa.wrap(model, **{**REPAIR, "weights": folder, "calibration": batches(), **fields})
    assert list(model.modules()) == modules


def test_another_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    other = dense(folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "tuned")
    in_4_bits(folder).save_pretrained(tmp_path / "quantised")
    fields = {**REPAIR, "calibration": batches()}
    with pytest.raises(
        ValueError, match=r"weights: .*tuned has another weight in layer model\.layers\.0\.self_attn\.q_proj"
    ):
        pissa.wrap(in_4_bits(folder), **fields, weights=tmp_path / "tuned")
    with pytest.raises(
        ValueError, match=r"weights: .*quantised contains codes of bitsandbytes .*; needed: weights in 16 or 32 bits"
    ):
        pissa.wrap(in_4_bits(folder), **fields, weights=tmp_path / "quantised")
    with pytest.raises(ValueError, match="weights: got a checkpoint, but bitsandbytes keeps no layer of the model"):
        pissa.wrap(dense(folder), **fields, weights=folder)
    with pytest.raises(ValueError, match=r"weights: .*is not a model: there is no such folder"):
        pissa.wrap(in_4_bits(folder), **fields, weights="nowhere/at-all")
