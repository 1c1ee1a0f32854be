"""What pissa.load refuses: a message names the file, the tensor or the layer, and says how to go on."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pissa
from mapped_files import read_tensors
from pissa.checkpoints.init import init

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of kernels that bitsandbytes could download
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

R = 4
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, two of its splits, which differ in the values of the model, and what bitsandbytes makes of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("made")
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    for seed, name in enumerate(("source", "other source")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).to(torch.bfloat16).save_pretrained(folder / name)
    init(folder / "source", folder / "split", pissa.PissaConfig(r=R, quant="nf4"))
    init(folder / "other source", folder / "other", pissa.PissaConfig(r=R, quant="nf4"))
    init(folder / "source", folder / "explicit", pissa.PissaConfig(r=R))
    for name, how in {
        "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    }.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "source", quantization_config=how)
        model.save_pretrained(folder / name)
    return folder


def copy(made: Path, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / name, tmp_path / "folder"))


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], Any], file: str = "model.safetensors") -> None:
    tensors = read_tensors(folder / file)
    how(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


def flip(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Changes the lowest bit of one byte."""

    def how(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1).view(torch.uint8)[5] ^= 1

    return how


def move(folder: Path) -> None:
    (folder / "pissa_init" / "adapter_model.safetensors").unlink()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a code": (
        lambda folder: change(folder, flip(f"{LAYER}.weight")),
        rf"layer '{LAYER}': its residual does not have the fingerprint in .*pissa.json",
    ),
    "no scales": (
        lambda folder: change(folder, lambda tensors: tensors.pop(f"{LAYER}.weight.absmax")),
        rf"'{LAYER}.weight': no 4-bit weight of bitsandbytes: got the entries .*; needed: weight",
    ),
    "codes of another shape": (
        lambda folder: change(folder, lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:-2].clone()})),
        rf"'{LAYER}.weight': weight: codes of a matrix \[128, 64\] in blocks of 64: got torch.uint8 \[4094\]; needed",
    ),
    "a whole layer": (
        lambda folder: change(
            folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(LAYER)]
        ),
        rf"lacks 1 tensors of a LlamaForCausalLM, '{LAYER}.weight' the first",
    ),
    "no start": (move, r"adapter_model.safetensors is missing"),
    "a start of another rank": (
        lambda folder: change(
            folder,
            lambda t: t.update({f"base_model.model.{LAYER}.lora_A.weight": torch.zeros(R + 1, 64)}),
            "pissa_init/adapter_model.safetensors",
        ),
        rf"expected torch.float32 \[4, 64\], for the start factors of layer {LAYER}",
    ),
    "no architecture": (
        lambda folder: edit(folder, architectures=["Unheard"]),
        r"architectures is \['Unheard'\]; needed: a class of transformers",
    ),
    "start, a bit": (
        lambda folder: change(
            folder, flip(f"base_model.model.{LAYER}.lora_A.weight"), "pissa_init/adapter_model.safetensors"
        ),
        r"layer 'model\.layers\.1\.mlp\.up_proj': its start factors do not .*adapter_model\.safetensors is damaged",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
}


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder(what: str, made: Path, tmp_path: Path) -> None:
    folder = copy(made, "split", tmp_path)
    damage, words = DAMAGE[what]
    damage(folder)
    with pytest.raises(ValueError, match=words):
        pissa.load(folder)


def test_damaged_factors_that_a_residual_lacks(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    init(made / "source", folder, pissa.PissaConfig(r=R, quant="nf4", quant_iters=2))
    pissa.load(folder)
    change(folder, flip(f"{LAYER}.recipe.b"), "pissa.safetensors")
    with pytest.raises(ValueError, match=r"up_proj': its start factors .* or .*folder.pissa\.safetensors is damaged"):
        pissa.load(folder)


@pytest.mark.parametrize("other", ["other", "explicit"])
def test_the_record_of_another_folder(other: str, made: Path, tmp_path: Path) -> None:
    folder = copy(made, "split", tmp_path)
    shutil.copy(made / other / "pissa.json", folder)
    with pytest.raises(
        ValueError, match=r"layer 'model.layers.0.self_attn.q_proj': its residual does not have the fingerprint"
    ):
        pissa.load(folder)


def test_an_adapter_of_another_folder(made: Path, tmp_path: Path) -> None:
    model = pissa.load(made / "other")
    model.warned_of_plain_lora = True
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match=r"the model is not the base that .*run was trained on: .*layers.0.self_attn"):
        pissa.load(made / "split", adapter=tmp_path / "run")
    explicit = pissa.load(made / "explicit")
    explicit.warned_of_plain_lora = True
    explicit.save_pretrained(tmp_path / "explicit run")
    with pytest.raises(
        ValueError, match=r"was trained on another base function: the residual of layer .* was explicit"
    ):
        pissa.load(made / "split", adapter=tmp_path / "explicit run")


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("split", {"r": R, "quant": "int8"}, r"residuals of .* are nf4 .* and cannot become int8: leave quant"),
        ("split", {"r": R, "residual": "explicit"}, r"are nf4 .* and cannot become explicit"),
        (
            "split",
            {"r": R, "target_modules": ["q_proj"]},
            r"layer '.*down_proj' has no adapter, but .*keeps a residual",
        ),
        ("split", {"r": R, "adapter_name": "a.b"}, r"adapter_name: got 'a.b'"),
        ("fp4", {"r": R}, r"quantised as fp4; allowed: nf4"),
        ("8 bits", {"r": R}, r"its weight is in 8 bits, .*: pissa.wrap\(AutoModel"),
    ],
)
def test_what_the_folder_cannot_be(name: str, fields: dict[str, Any], words: str, made: Path) -> None:
    with pytest.raises(ValueError, match=words):
        pissa.load(made / name, **fields)


def test_the_dtype_to_compute_in(made: Path, tmp_path: Path) -> None:
    folder = copy(made, "8 bits", tmp_path)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(folder, quantization_config=quantization | {"bnb_4bit_compute_dtype": "int8"})
    with pytest.raises(ValueError, match=r"config\.json: bnb_4bit_compute_dtype is 'int8'; needed: float32"):
        pissa.load(folder, r=R)


def test_one_configuration(made: Path) -> None:
    config = pissa.PissaConfig(r=R)
    for given in ({"config": config, "r": R}, {"config": config, "adapter": "run"}, {"r": R, "adapter": "run"}):
        with pytest.raises((TypeError, ValueError), match=r"give config, its fields or adapter|holds no PiSSA"):
            pissa.load(made / "split", **given)
    with pytest.raises(TypeError, match=r"config must be a pissa.PissaConfig"):
        pissa.load(made / "split", {"r": R})  # type: ignore[arg-type]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'none'} is missing")):
        pissa.load(tmp_path / "none")
