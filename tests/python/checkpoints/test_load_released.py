"""pissa.load of models as they are released: the codes stay what they are, mapped, and all that an adapter does on a
dense base it does on them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import architecture_checks as checks
import checkpoint_folders
import pissa
from architectures import ARCHITECTURES
from daily import each
from language_models import logits, moved, train
from mapped_files import is_mapped, read_tensors
from oracle import change_all
from pissa import ops
from pissa.base.weights import CodedLinear
from pissa.checkpoints.init import init
from pissa.checkpoints.merge import merge
from pissa.containers.checkpoint import Checkpoint
from pissa.containers.model_folder import Part
from pissa.integrations.export import export
from pissa.layers.experts import UnfusedExperts
from released_folders import DENSE_LAYOUTS, FIELDS, release, released


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *(("llama", layout) for layout in DENSE_LAYOUTS),
        ("gpt_oss", "mxfp4-gpt-oss"),
        ("qwen3_moe", "fp8-tiles"),
        ("qwen3_moe", "int4-compressed"),
        ("qwen3_moe", "nvfp4-modelopt"),  # of two global scales an expert
    ],
)
@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_an_adapter_on_released_codes(kind: str, layout: str, init: str, tokens: Tensor, tmp_path: Path) -> None:
    dense = released(kind, layout, tmp_path / "model")
    # In float32 products show the codes' own values, which bfloat16 weights have only of formats that it holds.
    model = pissa.load(tmp_path / "model", init=init, dtype=torch.float32, **FIELDS)
    coded = [module for module in model.modules() if isinstance(module, CodedLinear)]
    assert {module.format for module in coded} == {layout.partition("-")[0]}
    held = {id(module): module.weight.clone() for module in coded}
    start = logits(model, tokens)
    rounded = {"int4", "nvfp4", "fp8"} & {layout.partition("-")[0]}
    bound = 2.0**-8 if rounded else 2e-5  # of bfloat16, to which `release` rounds the dense weights
    assert (start - logits(dense, tokens)).norm() <= bound * start.norm()
    losses = train(model, tokens)
    assert losses[-1] < losses[0]
    assert all(torch.equal(module.weight, held[id(module)]) for module in coded)
    trained = logits(model, tokens)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), start)
    model.warned_of_plain_lora = True
    model.save_pretrained(tmp_path / "run")
    again = pissa.load(tmp_path / "model", adapter=tmp_path / "run", dtype=torch.float32)
    assert torch.equal(logits(again, tokens), trained)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_near(logits(merged, tokens), trained)
    assert torch.equal(logits(model.unload(), tokens), start)


def test_codes_that_do_not_make_a_matrix_are_refused(tmp_path: Path) -> None:
    released("qwen3_moe", "fp8-tiles", tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    coded = "model.layers.0.self_attn.q_proj.weight"
    for part in (Part(coded, transposed=True), Part(coded, member=0)):
        with pytest.raises(ValueError, match=rf"{coded} is codes, which cannot be transposed or cut"):
            checkpoint.codes([part])

    def one_dense(found: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "model.layers.1.mlp.experts.2.down_proj"
        del found[f"{name}.weight_scale_inv"]
        return found | {f"{name}.weight": found[f"{name}.weight"].bfloat16()}

    del checkpoint  # which has the files mapped
    checkpoint_folders.change_tensors(tmp_path, one_dense)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj has codes and other tensors"):
        pissa.load(tmp_path, **FIELDS)


YEAR: dict[str, tuple[str | None, str | None]] = {
    "qwen3_5": ("fp8-tiles", None),
    "qwen3_5_moe": ("fp8-tiles", None),
    "gemma4": ("nvfp4-modelopt", None),
    "deepseek_v4": ("fp8-tiles", "mxfp4-deepseek"),
    "glm_moe_dsa": ("fp8-tiles", None),
    "kimi_k2": (None, "int4-compressed"),
    "minimax_m2": ("fp8-tiles", None),
    "mimo_v2_flash": ("fp8-tiles", None),
    "ministral3": ("fp8-tensor", None),
}
"""Architectures, and the layout in which they are released; that of the experts, if it is another."""


@pytest.mark.parametrize("name", each(YEAR, ["deepseek_v4", "kimi_k2"]))
@pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning")
def test_an_architecture_in_the_format_that_it_comes_in(name: str, tmp_path: Path) -> None:
    """Under the names of its checkpoints: the start is the dequantised model, training goes on, and comes back."""
    architecture = ARCHITECTURES[name]
    dense = release(architecture.make(), YEAR[name][0], tmp_path / "model", YEAR[name][1]).float().eval()
    model = pissa.load(tmp_path / "model", r=4, init="pissa", dtype=torch.float32).eval()
    formats = {layout.partition("-")[0] for layout in YEAR[name] if layout}
    assert {module.format for module in model.modules() if isinstance(module, CodedLinear)} == formats
    batch = architecture.batch()
    start, expected = checks.output(model, batch), checks.output(dense, batch)
    assert (start - expected).norm() <= 2.0**-6 * expected.norm()  # of bfloat16, several layers deep
    checks.step(model, batch)
    trained = checks.output(model, batch)
    assert not torch.equal(trained, start)
    with model.disable_adapter():
        assert torch.equal(checks.output(model, batch), start)
    model.warned_of_plain_lora = True
    model.save_pretrained(tmp_path / "run")
    again = pissa.load(tmp_path / "model", adapter=tmp_path / "run", dtype=torch.float32, is_trainable=False)
    assert torch.equal(checks.output(again, batch), trained)


def test_embeddings_compute_from_their_codes(tokens: Tensor, tmp_path: Path) -> None:
    dense = released("llama", "fp8-tiles", tmp_path / "model")

    def change(state: dict[str, Tensor]) -> None:
        values = state["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
        state |= {"model.embed_tokens.weight": values, "model.embed_tokens.weight_scale": torch.tensor([0.5])}

    values = dense.model.embed_tokens.weight.to(torch.float8_e4m3fn).float() / 2
    model = pissa.load(changed(tmp_path / "model", change), init="lora", dtype=torch.float32, **FIELDS)
    embeddings = model.get_input_embeddings()
    assert embeddings.weight.dtype == torch.uint8
    assert torch.equal(embeddings.matrix().mT, values)
    with pytest.raises(ValueError, match=r"the weight of model\.embed_tokens is in codes"):
        model.resize_token_embeddings(100)
    dense.model.embed_tokens.weight.data = values
    assert (logits(model, tokens) - logits(dense, tokens)).norm() <= 2.0**-8 * logits(dense, tokens).norm()


def test_the_codes_are_the_mapped_files(tmp_path: Path) -> None:
    released("gpt_oss", "mxfp4-gpt-oss", tmp_path / "model")
    model = pissa.load(tmp_path / "model", init="lora", **FIELDS)
    for module in model.modules():
        if isinstance(module, CodedLinear):
            assert is_mapped(module.weight, tmp_path / "model" / "model.safetensors")


@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_experts_with_a_lora_are_multiplied_at_once(
    init: str, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PiSSA's change has two terms, which the op does not know."""
    dense = released("gpt_oss", "mxfp4-gpt-oss", tmp_path / "model")
    model = pissa.load(tmp_path / "model", init=init, r=4, target_modules="all-linear", dtype=torch.float32)
    calls: list[int] = []
    grouped = ops.grouped_linear
    monkeypatch.setattr(ops, "grouped_linear", lambda *args, **of: calls.append(1) or grouped(*args, **of))
    start = logits(model, tokens)
    assert len(calls) == (2 * model.config.num_hidden_layers if init == "lora" else 0)
    assert_near(start, logits(dense, tokens))
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), start)
    change_all(model)
    at_once = logits(model, tokens)
    assert not torch.equal(at_once, start)
    monkeypatch.setattr(UnfusedExperts, "_groups", lambda *_: {})
    assert_near(logits(model, tokens), at_once)


def test_experts_that_nothing_adapts_compute_from_their_codes(tokens: Tensor, tmp_path: Path) -> None:
    dense = released("gpt_oss", "mxfp4-gpt-oss", tmp_path / "model")
    model = pissa.load(tmp_path / "model", r=4, target_modules=["q_proj"], dtype=torch.float32)
    assert_near(logits(model, tokens), logits(dense, tokens))


def test_another_adapter_and_a_quantised_form(tokens: Tensor, tmp_path: Path) -> None:
    released("llama", "fp8-tiles", tmp_path / "model")
    model = pissa.load(tmp_path / "model", dtype=torch.float32, **FIELDS)
    start = logits(model, tokens)
    model.add_adapter("second", pissa.PissaConfig(r=2, init="lora", target_modules=["q_proj"]))
    model.set_adapter("second")
    assert torch.equal(logits(model, tokens), start)
    with pytest.warns(pissa.notices.RequantizedWarning, match="layers are quantised already"):
        pissa.load(tmp_path / "model", quant="nf4", **FIELDS)


# ---- What is refused ------------------------------------------------------------------------------------------------


def changed(folder: Path, change: Any) -> Path:
    file = folder / "model.safetensors"
    state = read_tensors(file)
    change(state)
    save_file(state, file)
    return folder


def without(ending: str) -> Any:
    def change(state: dict[str, Tensor]) -> None:
        del state[next(name for name in sorted(state) if name.endswith(ending))]

    return change


def nan_scale(state: dict[str, Tensor]) -> None:
    name = next(name for name in sorted(state) if name.endswith("_scales"))
    state[name].view(-1)[7] = 255


def with_dense_beside(state: dict[str, Tensor]) -> None:
    name = next(name for name in sorted(state) if name.endswith("weight_packed"))
    state[name.replace("_packed", "")] = torch.zeros(2, 2, dtype=torch.uint8)


def short_scale(state: dict[str, Tensor]) -> None:
    name = next(name for name in sorted(state) if name.endswith("weight_scale"))
    state[name] = state[name][:, :-1].contiguous()


def fused_codes(state: dict[str, Tensor]) -> None:
    state["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(4, 128, 64).to(torch.float8_e4m3fn)


def scaled_inputs(state: dict[str, Tensor]) -> None:
    state["model.layers.0.self_attn.q_proj.pre_quant_scale"] = torch.ones(64)


@pytest.mark.parametrize(
    ("kind", "layout", "change", "message"),
    [
        ("qwen3_moe", "fp8-tiles", fused_codes, r"experts\.gate_up_proj' has codes in a layout that is not read"),
        ("llama", "fp8-tiles", scaled_inputs, "its inputs are scaled"),
        ("llama", "fp8-tiles", without("weight_scale_inv"), r"model\.safetensors: .*\.weight' has no scales beside it"),
        (
            "gpt_oss",
            "mxfp4-gpt-oss",
            nan_scale,
            r"model\.safetensors cannot be read: .*down_proj_scales': scales: a scale is NaN \(255\)",
        ),
        ("llama", "int4-compressed", with_dense_beside, "weight and weight_packed"),
        ("llama", "mxfp4-compressed", short_scale, r"model\.safetensors cannot be read: .*weight_scale': .*needed: \["),
    ],
)
def test_bad_files_are_refused_by_tensor_and_file(
    kind: str, layout: str, change: Any, message: str, tmp_path: Path
) -> None:
    released(kind, layout, tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        pissa.load(changed(tmp_path / "model", change), **FIELDS)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gptq", "contains codes that are not read (quant_method 'gptq' in config.json); needed"),
        ("fp8", "config.json says fp8, but there are no codes"),
    ],
)
def test_other_layouts_are_refused_by_name(method: str, message: str, tmp_path: Path) -> None:
    checkpoint_folders.llama().bfloat16().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=re.escape(message)):
        pissa.load(tmp_path / "model", **FIELDS)


# ---- As the dense checkpoint that it stands for ---------------------------------------------------------------------


RELEASED = [("gpt_oss", "mxfp4-gpt-oss"), ("qwen3_moe", "fp8-tiles"), ("llama", "int4-compressed")]


def dense_twin(model: nn.Module, folder: Path) -> Path:
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "layout"), RELEASED)
def test_init_merge_and_export_read_it_as_the_dense_checkpoint(
    kind: str, layout: str, tokens: Tensor, tmp_path: Path
) -> None:
    dense = dense_twin(released(kind, layout, tmp_path / "model"), tmp_path / "dense")
    config = pissa.PissaConfig(r=4, quant="nf4")
    for name in ("model", "dense"):
        init(tmp_path / name, tmp_path / f"{name}-split", config, experts="nf4")
    ours, expected = (pissa.load(tmp_path / f"{name}-split") for name in ("model", "dense"))
    assert torch.equal(logits(ours, tokens), logits(expected, tokens))
    model = moved(pissa.load(tmp_path / "model", init="lora", **FIELDS))
    model.warned_of_plain_lora = True
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "model" / "hf_quant_config.json").write_text("{}")  # ModelOpt's; the merged model is dense
    for name in ("model", "dense"):
        merge(tmp_path / "run", tmp_path / name, tmp_path / f"{name}-merged")
        export(tmp_path / "run", tmp_path / f"{name}-vllm", "vllm", base=tmp_path / name)
    files = [load_file(tmp_path / f"{name}-vllm" / "adapter_model.safetensors") for name in ("model", "dense")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())
    ours, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged") for name in ("model", "dense"))
    assert ours.dtype == torch.bfloat16
    assert not (tmp_path / "model-merged" / "hf_quant_config.json").exists()
    for name, value in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert dense.is_dir()


def test_a_format_whose_blocks_do_not_divide_rows_is_refused_before_anything_is_replaced() -> None:
    model = checkpoint_folders.llama(hidden_size=64, intermediate_size=96)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"down_proj: int4: got a weight of 96 columns; .* multiple of 64"):
        pissa.wrap(model, r=2, quant="int4")
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in before.items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
