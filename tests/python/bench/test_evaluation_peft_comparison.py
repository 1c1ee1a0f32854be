"""The folders for PEFT's method comparison: read as its run.py reads them, with PEFT's own PiSSA and with ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from pissa import PissaModel
from pissa.integrations.peft import disable, enable
from trainers import quiet

FOLDERS = sorted((Path(__file__).parents[3] / "bench/experiments/peft_method_comparison/experiments/pissa").iterdir())

pytestmark = quiet

TRAINING = {"model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "seed"}
TRAINING |= {"grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler", "query_template"}
"""Keys that every release of run.py has had since it has optimizer_type."""


def tiny() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=90))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_gives_peft_s_pissa_and_ours(folder: Path, tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(str(folder))
    assert type(config) is LoraConfig
    theirs = get_peft_model(tiny(), config, autocast_adapter_dtype=True)
    assert type(theirs).__mro__[1] is PeftModel
    enable()
    try:
        model = get_peft_model(tiny(), PeftConfig.from_pretrained(str(folder)), autocast_adapter_dtype=True)
    finally:
        disable()
    assert isinstance(model, PissaModel)
    own = model.peft_config["default"]
    assert (own.r, own.lora_alpha, own.target_modules) == (config.r, config.lora_alpha, {"q_proj", "v_proj"})
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size  # run.py asks for it


def test_training_parameters_are_those_that_run_py_knows() -> None:
    files = [path for folder in FOLDERS for path in folder.glob("training_params.json")]
    assert files
    for file in files:
        given = json.loads(file.read_text())
        assert given.keys() <= TRAINING
        assert given["optimizer_kwargs"].keys() == {"lr", "weight_decay"}  # they replace the default
