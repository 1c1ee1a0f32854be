"""Adapters as PEFT and the paper's authors leave them, trained a little."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from torch import Tensor, nn

from language_models import Make, logits, train


class Trained(NamedTuple):
    """A trained PiSSA adapter of PEFT in folders of its own."""

    adapter: Path
    initial: Path
    """The adapter before training, with init_lora_weights true."""
    logits: Tensor
    """Of the trained model."""


def train_pissa(base: nn.Module, tokens: Tensor, folder: Path, init: str = "pissa", **fields: object) -> Trained:
    """Trains PEFT's own PiSSA on `base`, which it changes."""
    with warnings.catch_warnings():
        # of its own conversion, which is not made
        warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern", UserWarning)
        config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": init} | fields)
    model = peft.get_peft_model(base, config)
    _save_initial(model, folder / "initial")
    train(model, tokens)
    return Trained(_save(model, folder / "adapter"), folder / "initial", logits(model.eval(), tokens))


def train_on_residual(make: Make, tokens: Tensor, folder: Path, dtype: torch.dtype = torch.float32) -> Trained:
    """The authors' layout: a residual model with the adapter in pissa_init, from which training goes on."""
    base = make(dtype=dtype)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa_niter_4")
    )
    _save_initial(model, folder / "residual" / "pissa_init")
    model.unload().save_pretrained(folder / "residual")
    residual = type(base).from_pretrained(folder / "residual")
    model = peft.PeftModel.from_pretrained(residual, folder / "residual" / "pissa_init", is_trainable=True)
    train(model, tokens)
    return Trained(_save(model, folder / "adapter"), folder / "residual", logits(model.eval(), tokens))


def save_subtracted(base: nn.Module, tokens: Tensor, folder: Path, **fields: object) -> Tensor:
    """What PEFT writes to `folder` with path_initial_model_for_weight_conversion; the logits of the trained model."""
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa", **fields)
    )
    initial = folder.parent / f"{folder.name}_initial"
    _save_initial(model, initial)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}
    train(model, tokens)
    with torch.no_grad():  # as small a change as fine-tuning makes
        for name, tensor in model.state_dict().items():
            if name in start:
                tensor.lerp_(start[name], 1 - 2.0**-6)
    trained = logits(model.eval(), tokens)
    with warnings.catch_warnings():
        # PEFT loads the initial adapter beside the trained one.
        warnings.filterwarnings("ignore", ".*changes the base weights of the model and should thus not be", UserWarning)
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(initial))
    return trained


def plain_logits(base: nn.Module, folder: Path, tokens: Tensor) -> Tensor:
    """Of `base` with the LoRA in the folder, as PEFT loads it."""
    return logits(peft.PeftModel.from_pretrained(base, folder), tokens)


def _save_initial(model: peft.PeftModel, folder: Path) -> None:
    config = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True
    _save(model, folder)
    config.init_lora_weights = init


def _save(model: peft.PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers` to `True`", UserWarning)
        model.save_pretrained(folder)
    return folder
