"""A checkpoint that is split on disk: the same bytes as in memory, for every way there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import devices
import pissa
from checkpoint_folders import change_tensors, contents, save, tensors_of
from interrupted import Interrupted
from language_models import logits
from pissa.adapters.pissa_layout import AdapterRecord
from pissa.base.bitsandbytes import from_state
from pissa.base.bitsandbytes_state import quantization_config
from pissa.base.digest import is_fingerprint
from pissa.base.start import StartFactors
from pissa.checkpoints import init as init_module
from pissa.checkpoints.init import Initialised, init
from pissa.checkpoints.output import FINISHED, Output
from pissa.config import Form
from pissa.layers.layer import pissa_layers
from reference import assert_close
from tiny_model import tiny_tokenizer

TOKENS = torch.randint(5, 97, (2, 12), generator=torch.Generator().manual_seed(1))

NF4, INT8, DENSE = {"quant": "nf4"}, {"quant": "int8"}, {"residual": "explicit"}


def split(source: Path, target: Path, *, memory: int = 10**9, experts: Any = "dense", **fields: Any) -> Initialised:
    return init(source, target, pissa.PissaConfig(**({"r": 4} | fields)), memory=memory, experts=experts)


def entries(found: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    """The entries of a quantised weight, without the bias."""
    prefix = f"{module}."
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def wrapped_layers(model: nn.Module, **fields: Any) -> dict[str, Any]:
    return pissa_layers(pissa.wrap(model, **({"r": 4} | fields)).base_model.model)


def plain(folder: Path, **fields: Any) -> nn.Module:
    """The new checkpoint and its adapter as any program loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return PeftModel.from_pretrained(model, folder / "pissa_init", **fields).eval()


@pytest.mark.parametrize("fields", [NF4, INT8, DENSE, NF4 | {"double_quant": False}, NF4 | {"quant_iters": 3}], ids=str)
@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.bfloat16), ("qwen2", torch.float32)])
def test_the_same_bytes_as_in_memory(kind: str, dtype: torch.dtype, fields: dict[str, Any], tmp_path: Path) -> None:
    model = save(kind, tmp_path / "src", dtype)
    before = contents(tmp_path / "src")
    done = split(tmp_path / "src", tmp_path / "out", **fields)
    assert contents(tmp_path / "src") == before
    layers, found = wrapped_layers(model, **fields), tensors_of(tmp_path / "out")
    factors = load_file(tmp_path / "out" / "pissa_init" / "adapter_model.safetensors")
    record = AdapterRecord.read(tmp_path / "out" / "pissa.json")
    assert record.layers.keys() == layers.keys()
    for name, layer in layers.items():
        base, start = layer.base, layer.start_of("default")
        if fields is DENSE:
            assert torch.equal(found[f"{name}.weight"], base.residual)
        else:
            codes = from_state(entries(found, name))
            for got, expected in zip(codes, base.residual, strict=True):
                assert torch.equal(got, expected) if isinstance(got, Tensor) else got == expected
        assert torch.equal(factors[f"base_model.model.{name}.lora_A.weight"], start.a0)
        assert torch.equal(factors[f"base_model.model.{name}.lora_B.weight"], start.b0)
        if start.recipe_rank is not None:
            assert torch.equal(found[f"{name}.recipe.a"], start.recipe[0])
            assert torch.equal(found[f"{name}.recipe.b"], start.recipe[1])
        assert (f"{name}.recipe.a" in found) == (start.recipe_rank is not None) == ("quant_iters" in fields)
        assert record.layers[name].weight == layer.weight_fingerprint.of(base)
        assert record.layers[name].stored == layer.residual_fingerprint.of(base)
        assert (record.layers[name].form, record.layers[name].r) == (base.form, 4)
    untouched = tensors_of(tmp_path / "src").keys() - {f"{name}.weight" for name in layers}
    assert all(torch.equal(found[name], tensors_of(tmp_path / "src")[name]) for name in untouched)
    assert done.layers == len(layers)
    weights, kept = tensors_of(tmp_path / "src"), {name: layer.base.matrix() for name, layer in layers.items()}
    lost = sum((weights[f"{name}.weight"] - matrix).square().sum() for name, matrix in kept.items())
    whole = sum(matrix.square().sum() for matrix in kept.values())
    assert done.error == pytest.approx(float((lost / whole).sqrt()), rel=0.25)


@pytest.mark.parametrize(
    ("kind", "fields", "bound"),
    [
        ("llama", NF4, 2**-7),
        ("qwen2", NF4, 2**-7),
        ("llama", INT8, 2**-5),
        ("llama", DENSE, 1e-5),
        ("gpt2", DENSE, 1e-5),
        ("mixtral", DENSE, 1e-5),
        ("qwen3_moe", DENSE, 1e-5),
        ("gpt_oss", DENSE, 1e-5),
        ("llama4", DENSE, 1e-5),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning", "ignore:MatMul8bitLt")
def test_logits_in_plain_transformers_and_peft(kind: str, fields: dict[str, Any], bound: float, tmp_path: Path) -> None:
    """bitsandbytes computes in bfloat16 on the CPU, whatever it is asked for, and in 8 bits rounds activations too."""
    model: Any = save(kind, tmp_path / "src")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    split(tmp_path / "src", tmp_path / "out", **fields)
    ours = logits(pissa.wrap(model, r=4, **fields).eval(), TOKENS)
    theirs = logits(plain(tmp_path / "out"), TOKENS)
    assert (theirs - ours).abs().max() <= bound * ours.abs().max()


def test_factors_that_a_residual_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the alternation before, and none."""
    save("llama", tmp_path / "src")
    given: dict[str, Any] = {}

    def alternated(task: Any) -> Any:
        starts, _ = started(task._replace(config=pissa.PissaConfig(r=4)))
        for name, start in zip(task.names, starts, strict=True):
            taken = (start.a0[:0], start.b0[:, :0]) if "q_proj" in name else (2 * start.a0, start.b0)
            given[name] = StartFactors(start.a0, start.b0, start.origin, None if "k_proj" in name else taken)
        return [given[name] for name in task.names], None

    started = init_module.start_with_codes
    monkeypatch.setattr(init_module, "start_with_codes", alternated)
    split(tmp_path / "src", tmp_path / "out", quant_iters=2, **NF4)
    kept = load_file(tmp_path / "out" / "pissa.safetensors")
    record, found, source = (
        AdapterRecord.read(tmp_path / "out" / "pissa.json"),
        tensors_of(tmp_path / "out"),
        tensors_of(tmp_path / "src"),
    )
    for name, start in given.items():
        a, b = kept.pop(f"{name}.recipe.a"), kept.pop(f"{name}.recipe.b")
        assert len(a) == 4
        assert record.layers[name].recipe == (start.recipe_rank or None)
        expected = {"q_proj": 0 * start.a0, "k_proj": start.a0}.get(name.rpartition(".")[2], 2 * start.a0)
        assert torch.equal(a, expected)
        [residual] = pissa.ops.residual_many([source[f"{name}.weight"]], [a], [b], [1.0], form="nf4")
        assert torch.equal(from_state(entries(found, name)).codes, residual.codes), name
    assert not kept


def test_dense_experts_are_split_as_in_a_dense_checkpoint(tmp_path: Path) -> None:
    """Without alternations, which are for the codes of the other layers."""
    save("mixtral", tmp_path / "src", torch.bfloat16)
    split(tmp_path / "src", tmp_path / "mixed", quant_iters=2, **NF4)
    split(tmp_path / "src", tmp_path / "dense", **DENSE)
    mixed, dense = (AdapterRecord.read(tmp_path / name / "pissa.json").layers for name in ("mixed", "dense"))
    experts = {name for name in dense if ".experts." in name}
    assert {name for name in mixed if mixed[name] == dense[name]} == experts != set()


def test_matrices_go_through_the_device(tmp_path: Path) -> None:
    """Within its rounding, what the CPU makes; all of it in files that say so."""
    save("llama", tmp_path / "src", torch.bfloat16)
    config = pissa.PissaConfig(r=4, **NF4)
    init(tmp_path / "src", tmp_path / "out", config, device=devices.current)
    split(tmp_path / "src", tmp_path / "cpu", **NF4)
    record = AdapterRecord.read(tmp_path / "out" / "pissa.json")
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "cpu")
    for name, layer in record.layers.items():
        weight = tensors_of(tmp_path / "src")[f"{name}.weight"]
        codes, expected = (from_state(entries(found, name)) for found in (ours, theirs))
        assert is_fingerprint(layer.weight, weight)
        assert is_fingerprint(layer.stored, *codes.tensors().values())
        assert_close(
            pissa.ops.dequantize(codes), pissa.ops.dequantize(expected), 0.3 * weight.float().abs().max(), name
        )


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_shards_index_and_small_files(tmp_path: Path) -> None:
    save("llama", tmp_path / "src", shards="100KB")
    (tmp_path / "src" / "tokenizer.json").write_text("{}")
    (tmp_path / "src" / "pytorch_model.bin").write_bytes(b"pickle")
    for name in ("original/params.json", "checkpoint-100/tokenizer.json", ".cache/huggingface/download/tokenizer.json"):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    split(tmp_path / "src", tmp_path / "out", **NF4)
    shards = sorted(path.name for path in (tmp_path / "src").glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [
            *shards,
            *("config.json", "generation_config.json", "model.safetensors.index.json", "pissa.json"),
            *("pissa_init", "tokenizer.json", FINISHED),
        ]
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {name: load_file(tmp_path / "out" / name) for name in shards}
    assert index["weight_map"] == {tensor: name for name, held in files.items() for tensor in held}
    assert index["metadata"]["total_size"] == sum(value.nbytes for held in files.values() for value in held.values())
    for name, held in files.items():
        theirs = load_file(tmp_path / "src" / name)
        assert {key.split(".weight")[0] for key in held} == {key.split(".weight")[0] for key in theirs}
    plain(tmp_path / "out")


def test_folders_of_the_tokenizer_are_copied(tmp_path: Path) -> None:
    """As transformers makes them: named chat templates, and the second tokenizer of a processor."""
    save("llama", tmp_path / "src")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    for folder in (tmp_path / "src", tmp_path / "src" / "qformer_tokenizer"):
        tokenizer.save_pretrained(folder)
    (tmp_path / "src" / "qformer_tokenizer" / "model.safetensors").touch()
    split(tmp_path / "src", tmp_path / "out", **NF4)
    for folder in (tmp_path / "out", tmp_path / "out" / "qformer_tokenizer"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    assert not (tmp_path / "out" / "qformer_tokenizer" / "model.safetensors").exists()


def test_every_format_is_declared_to_transformers() -> None:
    declared = [quantization_config(Form(kind), torch.float32, []) for kind in ("nf4", "int8")]
    assert len({(config["load_in_4bit"], config["load_in_8bit"]) for config in declared}) == 2
    with pytest.raises(KeyError, match="mxfp4"):
        quantization_config(Form("mxfp4"), torch.float32, [])


def test_config_names_what_stays_dense(tmp_path: Path) -> None:
    save("llama", tmp_path / "src", torch.bfloat16)
    split(tmp_path / "src", tmp_path / "out", target_modules=["q_proj"], **NF4)
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert found["load_in_4bit"]
    assert found["bnb_4bit_compute_dtype"] == "bfloat16"
    assert "model.layers.0.self_attn.k_proj" in found["llm_int8_skip_modules"]
    assert "model.layers.0.self_attn.q_proj" not in found["llm_int8_skip_modules"]
    model: Any = plain(tmp_path / "out", is_trainable=True)
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_the_adapter_is_a_plain_lora_of_the_rank(tmp_path: Path) -> None:
    save("llama", tmp_path / "src")
    split(tmp_path / "src", tmp_path / "out", lora_alpha=8, rank_pattern={"q_proj": 2}, **DENSE)
    config = json.loads((tmp_path / "out" / "pissa_init" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["rank_pattern"] == {"q_proj": 2}
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(tmp_path / "out")
    assert AdapterRecord.read(tmp_path / "out" / "pissa.json").config.base_model_name_or_path == str(tmp_path / "src")


# ---- Memory, and runs that end early ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_memory_does_not_change_the_bytes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(kind, tmp_path / "src", torch.bfloat16)
    sizes = []
    splitting = init_module.start_with_codes

    def counted(task: Any) -> Any:
        sizes.append(len(task.weights))
        return splitting(task)

    monkeypatch.setattr(init_module, "start_with_codes", counted)
    split(tmp_path / "src", tmp_path / "out", **NF4)
    assert max(sizes) > 1
    first = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "first")
    sizes.clear()
    split(tmp_path / "src", tmp_path / "out", memory=1, **NF4)
    assert sizes == [1] * len(sizes)
    assert contents(tmp_path / "out") == first


def test_another_plan_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path / "src")

    with monkeypatch.context() as patch:
        patch.setattr(Output, "add", Interrupted(Output.add, at=1))
        with pytest.raises(KeyboardInterrupt):
            split(tmp_path / "src", tmp_path / "out", **NF4)
    others: dict[str, dict[str, Any]] = {
        "r was 4, is 8": {"r": 8},
        "seed was 0, is 1": {"seed": 1},
        "init was 'pissa', is 'lora'": {"init": "lora"},
        "experts was 'dense', is 'nf4'": {"experts": "nf4"},
    }
    for words, fields in others.items():
        with pytest.raises(ValueError, match=f"plan: {words}"):
            split(tmp_path / "src", tmp_path / "out", **fields, **NF4)
    change_tensors(tmp_path / "src", lambda found: found)
    with pytest.raises(ValueError, match=r"source model\.safetensors was .*To start anew, remove"):
        split(tmp_path / "src", tmp_path / "out", **NF4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite(value: float, tmp_path: Path) -> None:
    save("llama", tmp_path / "src")
    name = "model.layers.1.mlp.up_proj.weight"

    def damaged(found: dict[str, Tensor]) -> dict[str, Tensor]:
        found[name][3, 5] = value
        return found

    change_tensors(tmp_path / "src", damaged)
    with pytest.raises(ValueError, match=r"model\.safetensors.*layer model\.layers\.1\.mlp\.up_proj: weight") as error:
        split(tmp_path / "src", tmp_path / "out", memory=1, **NF4)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
