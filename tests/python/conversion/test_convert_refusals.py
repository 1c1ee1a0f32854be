"""What conversion refuses: malformed files, and arguments without sense."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pissa
from language_models import Make
from lora_files import NAMES, PATTERNS, config_of, train_ours
from peft_adapters import save_subtracted
from pissa.adapters.pissa_layout import MARK
from pissa.containers.tensor_file import TensorFile, write_tensors


@pytest.fixture
def ours(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> Path:
    """A trained adapter of ours."""
    train_ours(tiny_llama, tokens, tmp_path / "ours", **PATTERNS)
    return tmp_path / "ours"


# ---- What is refused -------------------------------------------------------------------------------------------------


def spoil_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / NAMES[1])
        change(tensors)
        save_file(tensors, folder / NAMES[1])

    return spoil


def spoil_config(**fields: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / NAMES[0]).write_text(json.dumps(config_of(folder) | fields))

    return spoil


Q = "base_model.model.model.layers.0.self_attn.q_proj"
SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, r"adapter is missing; needed: an adapter folder"),
    "no config": (lambda folder: (folder / NAMES[0]).unlink(), "holds no adapter: there is no adapter_config.json"),
    "a pickle": (
        lambda folder: (folder / NAMES[1]).rename(folder / "adapter_model.bin"),
        "adapter_model.bin next to it is a pickle, which is never read",
    ),
    "no json": (lambda folder: (folder / NAMES[0]).write_text("{"), "adapter_config.json cannot be read: Expecting"),
    "another method": (spoil_config(peft_type="LOHA"), "peft_type is 'LOHA'; needed: 'LORA'"),
    "a later variant": (spoil_config(use_something=True), "use_something is True, a variant of LoRA"),
    "rank": (spoil_config(r=0), "the rank of .* is 0; needed: 1 or more"),
    "alpha": (spoil_config(lora_alpha="8"), "lora_alpha is '8', which PEFT does not write"),
    "pattern": (spoil_config(rank_pattern={"(": 1}), "adapter_config.json cannot be read: missing \\)"),
    "another start": (spoil_config(init_lora_weights="corda"), "'corda', which changes the base, and the folder lacks"),
    "experts": (
        spoil_config(target_parameters=["self_attn.q_proj.kernel"]),
        "are those of a parameter, but target_parameters names",
    ),
    "another rank": (
        spoil_config(rank_pattern={"q_proj": 5}),
        rf"{Q}.lora_A.weight' is torch.float32 \[4, 64\], expected .* \[5, 64\], for .*, whose rank is 5",
    ),
    "no partner": (
        spoil_tensors(lambda tensors: tensors.pop(f"{Q}.lora_B.weight")),
        rf"module '{Q}' has the tensors \['lora_A.weight'\]; needed: lora_A.weight and",
    ),
    "nothing": (spoil_tensors(dict.clear), "holds no factors"),
    "a vector": (
        spoil_tensors(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4)})),
        rf"{Q}.lora_A.weight' is torch.float32 \[4\], expected .* \[4, 1\], for .*, whose rank is 4",
    ),
    "an empty row": (
        spoil_tensors(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4, 0)})),
        rf"{Q}.lora_A.weight' is torch.float32 \[4, 0\], expected .* \[4, 1\], for .*, whose rank is 4",
    ),
    "no row": (
        spoil_tensors(lambda tensors: tensors.update({f"{Q}.lora_B.weight": torch.ones(0, 4)})),
        rf"{Q}.lora_B.weight' is torch.float32 \[0, 4\], expected .* \[1, 4\], for .*, whose rank is 4",
    ),
    "a kernel": (
        spoil_tensors(
            lambda tensors: tensors.update(
                {f"{Q}.lora_A.weight": torch.ones(4, 2, 3), f"{Q}.lora_B.weight": torch.ones(5, 4, 3)}
            )
        ),
        rf"{Q}.lora_B.weight' is torch.float32 \[5, 4, 3\], expected .* \[5, 4, 1\], for .*, whose rank is 4",
    ),
    "integers": (
        spoil_tensors(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4, 64, dtype=torch.int32)})),
        rf"tensor '{Q}.lora_A.weight' is torch.int32",
    ),
    "unknown": (
        spoil_tensors(lambda tensors: tensors.update({f"{Q}.lora_C.weight": torch.ones(4)})),
        rf"module '{Q}' has the tensors \['lora_A.weight', 'lora_B.weight', 'lora_C.weight'\]; needed: ",
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA of PEFT's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 31, "hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))
    folder = tmp_path_factory.mktemp("plain")
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SPOILT)
def test_malformed_files_are_refused_by_name(name: str, plain: Path, tmp_path: Path) -> None:
    spoil, message = SPOILT[name]
    shutil.copytree(plain, tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as raised:
        pissa.convert(tmp_path / "adapter", tmp_path / "lora", rank=2)
    assert str(tmp_path / "adapter") in str(raised.value)
    assert not (tmp_path / "lora").exists()


def test_files_of_two_saves_are_refused(ours: Path, tmp_path: Path) -> None:
    config, tensors = config_of(ours), load_file(ours / NAMES[1])
    (ours / NAMES[0]).write_text(json.dumps(config | {"lora_alpha": 7}))
    with pytest.raises(
        ValueError,
        match=r"do not belong together: .* has rank 8 and scaling .*, and rank 8 .* in pissa\.safetensors",
    ):
        pissa.convert(ours, tmp_path / "lora")
    (ours / NAMES[0]).write_text(json.dumps(config))
    mark = TensorFile(ours / NAMES[1]).metadata[MARK]
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] += 1
    write_tensors(ours / NAMES[1], tensors, {MARK: mark[::-1]})
    with pytest.raises(ValueError, match=r"is not that of pissa\.safetensors, because saving was interrupted"):
        pissa.convert(ours, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_what_peft_leaves_out_when_it_subtracts(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """Its files load without a complaint, or not at all; another function is not passed on."""
    save_subtracted(tiny_llama(), tokens, tmp_path / "dora", use_dora=True)
    with pytest.raises(ValueError, match=r"proj\.lora_magnitude_vector' is missing, of DoRA \(PEFT leaves"):
        pissa.convert(tmp_path / "dora", tmp_path / "lora")
    for field, value in {"modules_to_save": ["norm"], "trainable_token_indices": [1, 2]}.items():
        save_subtracted(tiny_llama(), tokens, tmp_path / field, **{field: value})
        with pytest.raises(ValueError, match=f"lacks {field}, which PEFT leaves out"):
            pissa.convert(tmp_path / field, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_arguments_that_make_no_sense(ours: Path, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for source, target, message, fields in [
        (ours, ours, "is not empty .*nothing is overwritten", {}),
        (ours, tmp_path / "file", "is a file; needed: a new folder", {}),
        (ours, tmp_path / "lora", "rank must be a whole number from 1 on, got 0", {"rank": 0}),
        (ours, tmp_path / "lora", "is an adapter of pissa; initial is of no use with it", {"initial": ours}),
        (plain, tmp_path / "lora", "is a plain LoRA already", {}),
    ]:
        with pytest.raises(ValueError, match=message):
            pissa.convert(source, target, **fields)
    assert not (tmp_path / "lora").exists()
