"""`to="vllm"`: what vLLM's loader makes of the folder, by its rules and by its own code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import checkpoint_folders
import pissa
from oracle import change_all
from pissa import notices
from pissa.checkpoints.merge import merge
from pissa.integrations.exported import Exported
from pissa.integrations.vllm import RANKS
from vllm_loader import vllm_loader

EXPERTS = 4


def trained(kind: str, folder: Path, *, embeddings: bool = False, **fields: Any) -> tuple[Path, Path]:
    """A model and an adapter far from its start: their folders."""
    checkpoint_folders.save(kind, folder / "base", **{"attention_bias": True} if kind == "llama" else {})
    config = json.loads((folder / "base" / "config.json").read_text())
    base = getattr(transformers, config["architectures"][0]).from_pretrained(folder / "base")
    model = pissa.wrap(base, **{"r": 4} | fields)
    change_all(model)
    model.warned_of_plain_lora = True
    model.save_pretrained(folder / "run", save_embedding_layers=embeddings)
    return folder / "base", folder / "run"


def export(base: Path, run: Path, **options: Any) -> tuple[Path, Exported]:
    out = run.parent / "out"
    done = pissa.export(run, out, "vllm", base=base, **options)
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return out, done


def allowed_rank(done: Exported) -> int:
    match = re.search(r"--max-lora-rank (\d+)", done.load)
    assert match is not None
    return int(match[1])


def by_rules(folder: Path, done: Exported, expected: set[str]) -> dict[str, tuple[float, Tensor, Tensor]]:
    """The scaling and the factors of each module: one rank and scaling for all, modules by the names of tensors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert config["r"] <= allowed_rank(done)
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {re.sub(r"^base_model\.model\.(.*)\.lora_[AB]\.weight$", r"\1", key) for key in tensors}
    pairs = {name: [tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB"] for name in names}
    scaling = config["lora_alpha"] / config["r"]
    return {name: (scaling, a, b) for name, (a, b) in pairs.items()}


def by_vllm(folder: Path, done: Exported, expected: set[str]) -> dict[str, tuple[float, Tensor, Tensor]]:
    """The same by PEFTHelper and LoRAModel."""
    with vllm_loader() as vllm:
        assert vllm.ranks == RANKS
        helper = vllm.PEFTHelper.from_local_dir(str(folder), None)
        helper.validate_legal(SimpleNamespace(max_lora_rank=allowed_rank(done)))
        model = vllm.LoRAModel.from_local_checkpoint(
            str(folder), expected, helper, device="cpu", dtype=torch.float32, lora_model_id=1
        )
        assert model.rank <= allowed_rank(done)
        check_packed(vllm, model.loras)
        return {name: (lora.scaling, lora.lora_a, lora.lora_b) for name, lora in model.loras.items()}


def check_packed(vllm: SimpleNamespace, loras: dict[str, Any]) -> None:
    """The experts of a module, in the order of vLLM's mapping, become one stack of each weight."""
    for module in {name.partition(".experts.")[0] for name in loras if ".experts.0." in name}:
        leaves = ("w1", "w2", "w3") if f"{module}.experts.0.w1" in loras else ("gate_proj", "down_proj", "up_proj")
        names = [f"{module}.experts.{index}.{leaf}" for index in range(EXPERTS) for leaf in leaves]
        packed = vllm.PackedLoRALayerWeights.pack_moe([loras[name] for name in names], f"{module}.experts")
        for number, stack in enumerate(packed.lora_b):
            assert torch.equal(stack, torch.stack([loras[name].lora_b for name in names[number::3]]))


Reader = Callable[[Path, Exported, set[str]], dict[str, tuple[float, Tensor, Tensor]]]
READERS = [by_rules, pytest.param(by_vllm, marks=pytest.mark.slow)]

DENSE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def experts(*leaves: str) -> set[str]:
    return {f"experts.{index}.{leaf}" for index in range(EXPERTS) for leaf in leaves}


CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": ("llama", {}, DENSE),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}, "lora_alpha": 5}, DENSE),
    "rslora": ("llama", {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {"o_proj": 2}}, DENSE),
    "mixtral": ("mixtral", {}, DENSE | {"gate"} | experts("w1", "w2", "w3")),
    "qwen3_moe": ("qwen3_moe", {"use_rslora": True}, DENSE | {"gate"} | experts("gate_proj", "up_proj", "down_proj")),
    "deepseek_v2": (
        "deepseek_v2",
        {},
        DENSE
        | {"gate", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
        | experts("gate_proj", "up_proj", "down_proj"),
    ),
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("case", CASES)
def test_each_tensor_of_the_checkpoint_gets_its_change(case: str, read: Reader, tmp_path: Path) -> None:
    """vLLM calls modules as the checkpoint does; what they become is what `pissa merge` makes of its tensors."""
    kind, fields, expected = CASES[case]
    base, run = trained(kind, tmp_path, **fields)
    out, done = export(base, run)
    merge(run, base, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    found = read(out, done, expected)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {f"{name}.weight" for name in found} == changed
    for name, (scaling, a, b) in found.items():
        weight, merged = before[f"{name}.weight"], after[f"{name}.weight"]
        bound = 4 * torch.finfo(torch.float32).eps * float(merged.abs().max() + weight.abs().max())
        assert torch.allclose(weight + scaling * (b @ a), merged, rtol=0, atol=bound), name


@pytest.mark.parametrize("read", READERS)
def test_a_stack_of_experts_stays_one(read: Reader, tmp_path: Path) -> None:
    """GPT-OSS: gate_up_proj under `experts.base_layer`, down_proj under `experts`, the expert the faster index of B."""
    base, run = trained("gpt_oss", tmp_path)
    out, done = export(base, run)
    merge(run, base, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    found = read(out, done, DENSE | {"experts", "router"})
    for place, leaf in (("experts.base_layer", "gate_up_proj"), ("experts", "down_proj")):
        scaling, a, b = found[f"model.layers.1.mlp.{place}"]
        each = a.reshape(EXPERTS, -1, a.shape[1]), b.reshape(len(b), -1, EXPERTS).permute(2, 0, 1)
        change = scaling * torch.bmm(each[1], each[0]).mT
        name = f"model.layers.1.mlp.experts.{leaf}"
        assert torch.allclose(before[name] + change, after[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("r", "allowed"), [(4, 8), (5, 16), (40, 128)])
def test_the_engines_rank(r: int, allowed: int, tmp_path: Path) -> None:
    base, run = trained("llama", tmp_path, r=r, target_modules=["down_proj"])
    out, done = export(base, run)
    assert allowed_rank(done) == allowed
    assert done.load.endswith(f"--lora-modules NAME={out}")
    assert done.load.startswith(f"vllm serve {base} --enable-lora ")
    assert f"a LoRA of rank {2 * r}, 2 pairs of factors" in done.written


def test_names_of_layers_need_no_base(tmp_path: Path) -> None:
    _, run = trained("llama", tmp_path)
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    done = pissa.export(run, tmp_path / "out", "vllm")
    assert done.load.startswith("vllm serve BASE --enable-lora ")


def test_a_residual_in_4_bits_is_missed(tmp_path: Path) -> None:
    base, run = trained("llama", tmp_path, quant="nf4")
    with pytest.warns(notices.InexactLoraWarning, match="lacks the error of that storage"):
        export(base, run)


# ---- What is refused -------------------------------------------------------------------------------------------------


def refuses(message: str, run: Path, base: Path | None) -> None:
    with pytest.raises(ValueError, match=message):
        pissa.export(run, run.parent / "new" / "out", "vllm", base=base)
    assert not (run.parent / "new").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, r"run has use_dora=True: vLLM takes nothing from an adapter but factors of layers"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save=\['lm_head'\]: vLLM"),
        ({"trainable_token_indices": [3]}, r"has trainable_token_indices=\[3\]: vLLM"),
        ({"bias": "all"}, r"has bias='all': vLLM"),
    ],
    ids=["dora", "modules", "tokens", "biases"],
)
def test_what_vllm_lacks_is_refused_by_name(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    base, run = trained("llama", tmp_path, **fields)
    refuses(message, run, base)


def test_a_rank_that_no_engine_allows(tmp_path: Path) -> None:
    base, _ = trained("llama", tmp_path)
    config = peft.LoraConfig(r=600, target_modules=["q_proj"])
    peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "peft")
    refuses("peft has rank 600 as a LoRA; vLLM allows 512: lower it with pissa convert", tmp_path / "peft", base)


def test_experts_need_the_checkpoint(tmp_path: Path) -> None:
    _, run = trained("mixtral", tmp_path)
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    message = r"has factors of fused experts, model\.layers\.0\.mlp\.experts\.down_proj the first, .*give .* \(base\)"
    refuses(message, run, None)


def test_half_of_a_stack_is_refused(tmp_path: Path) -> None:
    fields = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    base, run = trained("gpt_oss", tmp_path, **fields)
    refuses(r"has factors of only 'down_proj' in model\.layers\..*vLLM takes both gate_up_proj and", run, base)


def test_a_convolution_is_refused(tmp_path: Path) -> None:
    base, run = trained("llava", tmp_path, target_modules=["patch_embedding"])
    refuses(r"layer .*patch_embedding is a convolution, for which vLLM takes no adapter", run, base)


def test_embeddings_are_the_bases(tmp_path: Path) -> None:
    """PEFT may save them beside their factors; vLLM does not read them."""
    base, run = trained("llama", tmp_path, embeddings=True, target_modules=["embed_tokens"])
    out, _ = export(base, run)
    keys = set(load_file(out / "adapter_model.safetensors"))
    assert keys == {f"base_model.model.model.embed_tokens.lora_embedding_{factor}" for factor in "AB"}
    checkpoint_folders.change_tensors(base, lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    refuses("is not a factor of a layer, and vLLM takes only those from an adapter. Run `pissa merge ", run, base)
