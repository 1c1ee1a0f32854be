"""pissa.load: a folder of packed weights, or of residuals, is the model that pissa.wrap makes, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pissa
from cuda_stand_in import CudaStandIn
from daily import each
from language_models import Make, logits, train
from mapped_files import is_mapped
from pissa import distributed, ops
from pissa.base.bitsandbytes import BnbLinear4bit
from pissa.checkpoints.init import init
from pissa.layers.layer import PissaLayer, pissa_layers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of kernels that bitsandbytes could download
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import deepspeed

R = 4
FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"quant": "nf4"},
    "nf4, flat scales": {"quant": "nf4", "double_quant": False},
    "int8": {"quant": "int8"},
    "explicit": {"residual": "explicit"},
    "alternations": {"quant": "nf4", "quant_iters": 3},
    "ranks": {"quant": "nf4", "rank_pattern": {"q_proj": 2, "down_proj": 7}, "lora_alpha": 8},
    "storage": {"quant": "nf4", "quant_storage": "bfloat16"},
}


@pytest.fixture
def source(tiny_llama: Make, tmp_path: Path) -> Path:
    """A dense model in bfloat16."""
    tiny_llama(dtype=torch.bfloat16, intermediate_size=128).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    """The same, which transformers has loaded in 4 bits and saved."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def split_folder(source: Path, target: Path, **fields: Any) -> Path:
    """What `pissa init` makes of a folder."""
    init(source, target, pissa.PissaConfig(**fields))
    return target


def dense_model(source: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(source)


def assert_same_model(model: nn.Module, expected: nn.Module) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert list(state) == list(wanted)
    for name, value in wanted.items():
        assert state[name].dtype == value.dtype, name
        got, wanted_bytes = (tensor.reshape(-1).view(torch.uint8) for tensor in (state[name], value))
        assert torch.equal(got, wanted_bytes), name
    trained = {name for name, parameter in expected.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    modes = {name: module.training for name, module in expected.named_modules()}
    assert {name: module.training for name, module in model.named_modules()} == modes


def assert_trains_alike(model: Any, expected: Any, tokens: Tensor, tmp_path: Path) -> None:
    """Logits, steps of training, and the files that are saved."""
    assert torch.equal(logits(model, tokens), logits(expected, tokens))
    assert train(model, tokens) == train(expected, tokens)
    folders = tmp_path / "run", tmp_path / "run expected"
    for one, folder in zip((model, expected), folders, strict=True):
        one.warned_of_plain_lora = True
        one.save_pretrained(folder)
    names = sorted(path.name for path in folders[1].iterdir())
    assert sorted(path.name for path in folders[0].iterdir()) == names
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


# ---- What transformers has saved in 4 bits ---------------------------------------------------------------------------


@pytest.mark.parametrize("fields", each([{}, {"use_dora": True}, {"init": "lora"}], [{}]), ids=str)
def test_packed_weights_are_what_wrap_makes_of_them(
    fields: dict[str, Any], packed: Path, tokens: Tensor, tmp_path: Path
) -> None:
    model = pissa.load(packed, r=R, task_type="CAUSAL_LM", **fields)
    expected = pissa.wrap(AutoModelForCausalLM.from_pretrained(packed), r=R, task_type="CAUSAL_LM", **fields)
    assert type(model) is type(expected)
    assert_same_model(model, expected)
    assert_trains_alike(model, expected, tokens, tmp_path)


def test_packed_weights_are_loaded_whole_where_zero_3_partitions_others(packed: Path) -> None:
    class Zero3:
        def is_zero3(self) -> bool:
            return True

    config = Zero3()
    deepspeed.set_hf_deepspeed_config(config)
    try:
        assert isinstance(pissa.load(packed, r=R).base_model.model.lm_head.weight, nn.Parameter)
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_nothing_of_a_file_is_copied(packed: Path, tokens: Tensor) -> None:
    model = pissa.load(packed, r=R, task_type="CAUSAL_LM")
    train(model, tokens)
    file, base = packed / "model.safetensors", model.base_model.model
    for name, layer in pissa_layers(base).items():
        assert isinstance(layer.base_layer, BnbLinear4bit)
        assert is_mapped(layer.base_layer.weight, file), name
    assert is_mapped(base.lm_head.weight, file)
    assert is_mapped(base.model.embed_tokens.weight, file)
    assert is_mapped(base.model.norm.weight, file)


def test_wrap_copies_no_packed_weight(packed: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(packed)
    places = {name: module.weight.data_ptr() for name, module in base.named_modules() if hasattr(module, "quant_state")}
    layers = pissa_layers(pissa.wrap(base, r=R).base_model.model)
    assert {name: layer.base_layer.weight.data_ptr() for name, layer in layers.items()} == places
    if sys.platform != "win32":  # where transformers reads weights instead of mapping them
        assert all(is_mapped(layer.base_layer.weight, packed / "model.safetensors") for layer in layers.values())


@pytest.mark.nightly
def test_bitsandbytes_is_not_needed(packed: Path, source: Path, tmp_path: Path) -> None:
    split = split_folder(source, tmp_path / "split", r=R, quant="nf4")
    code = f"""
        import sys
        from importlib.machinery import PathFinder

        class WithoutBitsandbytes(PathFinder):
            @classmethod
            def find_spec(cls, name, *rest):
                return None if name.partition(".")[0] == "bitsandbytes" else super().find_spec(name, *rest)

        sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutBitsandbytes
        import pissa
        import torch
        for model in (pissa.load({str(packed)!r}, r={R}), pissa.load({str(split)!r})):
            model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()
            model.merge_and_unload()
        assert "bitsandbytes" not in sys.modules
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)


def test_a_dense_folder_is_mapped_and_wrapped(source: Path, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.load(source, r=R)
    assert is_mapped(model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight, source / "model.safetensors")
    expected = pissa.wrap(dense_model(source), r=R, task_type="CAUSAL_LM")
    assert_same_model(model, expected)
    assert_trains_alike(model, expected, tokens, tmp_path)


def test_wrap_names_load_for_a_folder() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str; pissa.load\(folder\) makes one"):
        pissa.wrap("folder", r=R)  # type: ignore[arg-type]


# ---- What is split already -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", each(FORMS, ["nf4", "explicit", "alternations", "ranks"]))
def test_residuals_are_what_wrap_makes_of_the_dense_model(
    form: str, source: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = split_folder(source, tmp_path / "split", r=R, **FORMS[form])
    expected = pissa.wrap(dense_model(source), r=R, task_type="CAUSAL_LM", **FORMS[form])
    with monkeypatch.context() as patched:
        for name in ("split_many", "dequantize", "residual_many"):
            patched.delattr(ops, name)  # nothing is decomposed, decoded or stored anew
        model = pissa.load(folder)
    assert type(model) is type(expected)
    assert_same_model(model, expected)
    for layer in pissa_layers(model.base_model.model).values():
        assert is_mapped(layer.base.parameter, folder / "model.safetensors")
        assert layer.start_of("default") is layer.base.start  # or the product would not be fused
    assert_trains_alike(model, expected, tokens, tmp_path)


def test_dora_is_asked_for_when_the_folder_is_loaded(source: Path, tokens: Tensor, tmp_path: Path) -> None:
    folder = split_folder(source, tmp_path / "split", r=R, quant="nf4")
    fields = {"r": R, "quant": "nf4", "use_dora": True}
    expected = pissa.wrap(dense_model(source), task_type="CAUSAL_LM", **fields)
    model = pissa.load(folder, **fields)
    assert_same_model(model, expected)
    assert_trains_alike(model, expected, tokens, tmp_path)


@pytest.mark.parametrize("form", each(["nf4", "int8", "explicit", "alternations"], ["nf4", "explicit"]))
def test_a_saved_adapter_comes_back(form: str, source: Path, tokens: Tensor, tmp_path: Path) -> None:
    folder = split_folder(source, tmp_path / "split", r=R, **FORMS[form])
    model = pissa.load(folder)
    train(model, tokens)
    model.warned_of_plain_lora = True
    model.save_pretrained(tmp_path / "run")
    wanted = logits(model, tokens)
    again = pissa.load(folder, adapter=tmp_path / "run", is_trainable=False)
    assert torch.equal(logits(again, tokens), wanted)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert train(pissa.load(folder, adapter=tmp_path / "run"), tokens) == train(model, tokens)
    # On the dense model, and out of the way again.
    other = pissa.PissaModel.from_pretrained(dense_model(source), tmp_path / "run", is_trainable=True)
    assert torch.equal(logits(other, tokens), wanted)
    assert torch.equal(logits(again.merge_and_unload(), tokens), logits(other.merge_and_unload(), tokens))


@pytest.mark.parametrize("start", [{"init": "lora"}, {"init": "pissa"}], ids=str)
def test_another_adapter_on_the_same_residuals(
    start: dict[str, str], source: Path, tokens: Tensor, tmp_path: Path
) -> None:
    folder = split_folder(source, tmp_path / "split", r=R, quant="nf4")
    base = logits(pissa.load(folder), tokens)
    model = pissa.load(folder, r=2, **start, task_type="CAUSAL_LM")
    assert pissa_layers(model.base_model.model)["model.layers.0.self_attn.q_proj"].r == {"default": 2}
    # Other products: a fused one of the codes and the start, and one beside it, which is added in bfloat16.
    assert torch.allclose(logits(model, tokens), base, rtol=0.05, atol=0.05)
    losses = train(model, tokens)
    assert losses[-1] < losses[0]
    model.add_adapter("second", pissa.PissaConfig(r=R, quant="nf4"))
    layer = pissa_layers(model.base_model.model)["model.layers.0.self_attn.q_proj"]
    assert layer.start_of("second") is layer.base.start


def test_an_error_is_told_to_the_other_processes_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have gone by the second time, and would be waited for."""
    told: list[str] = []
    gather = distributed._gather

    def noted(value: object, error: str | None) -> Any:
        told.extend([] if error is None else [error])
        return gather(value, error)

    def fails(*args: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(distributed, "_gather", noted)
    monkeypatch.setattr(PissaLayer, "store_base", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        pissa.load(source, r=R, quant="nf4")
    assert told == ["RuntimeError: no memory"]


@pytest.mark.parametrize("form", each(["nf4", "explicit"], ["nf4"]))
def test_on_a_gpu_it_is_the_model_of_the_cpu(form: str, source: Path, tokens: Tensor, tmp_path: Path) -> None:
    """Its residuals and its start go there, and come from there into the files of an adapter."""
    folder = split_folder(source, tmp_path / "split", r=R, **FORMS[form])
    expected = {name: value.clone() for name, value in pissa.load(folder).state_dict().items()}
    with CudaStandIn():
        model = pissa.load(folder, device="cuda")
        assert {value.device.type for value in model.state_dict().values()} == {"cuda"}
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        loss = model(input_ids=tokens.to("cuda"), labels=tokens.to("cuda")).loss
        loss.backward()
        assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
        model.warned_of_plain_lora = True
        model.save_pretrained(tmp_path / "run")
        again = pissa.load(folder, adapter=tmp_path / "run", device="cuda")
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_a_packed_weight_of_another_shape(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text()) | {"intermediate_size": 256}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"down_proj\.weight' is \[64, 128\] in the folder and \[64, 256\] in the model"
    ):
        pissa.load(packed, r=R)
