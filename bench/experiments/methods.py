"""The methods that are compared: how each one makes a model trainable, and with which optimiser.

Methods that PEFT supports use PEFT's own code, on a dense base. Those on a 4-bit base use our kernels, because on a CPU
bitsandbytes 0.50 has no gradient in evaluation mode and an error of 14% in the gradients of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import pissa
from bench.experiments.triplets import EXACT, MEDIUM, MINOR, UNIT
from pissa import PissaConfig

pissa.INIT_METHODS.update({method.name: method for method in (EXACT, MEDIUM, MINOR, UNIT)})

LORAPLUS_RATIO = 16  # of B's rate to A's (arXiv 2402.12354, its authors' choice)


class Reading(NamedTuple):
    """What a base is calibrated on."""

    text: Literal["task", "prose", "half"] = "task"
    """The first training examples of the task; as many rows of prose that no measure has; half of each."""
    examples: int = 64
    diagonal: bool = False
    """Whether only the diagonals of the second moments are used."""

    def of(self, calibration: pissa.Calibration) -> pissa.Calibration:
        """The part of a calibration that is used."""
        if not self.diagonal:
            return calibration
        moments = {name: moment.diagonal().diag() for name, moment in calibration.moments.items()}
        return pissa.Calibration(moments, calibration.tokens)


class Setting(NamedTuple):
    """What a method may depend on in addition to the model."""

    r: int
    seed: int
    steps: int
    task_type: str | None
    target_modules: str | list[str] = "all-linear"
    svd_passes: int | Literal["auto", "exact"] = "auto"
    """Over each weight, of our decompositions; "exact": torch's own instead."""
    rank_pattern: Mapping[str, int] = MappingProxyType({})
    """Ranks of layers that have another than r; the scaling stays 1. PEFT's LoRA and our methods take it."""
    calibration: pissa.Calibration | None = None
    """Of the dense model, for a method that has a `reading`."""
    file: Path | None = None
    """The GGUF file that the model was decoded from."""


class Method(NamedTuple):
    """A way to fine-tune."""

    label: str
    """In tables and pictures."""
    wrap: Callable[[nn.Module, Setting], nn.Module]
    dense: bool = True
    """Whether the base is dense."""
    optimizer: Callable[[Any, float], Optimizer] | None = None
    """Of the model and the rate; None: AdamW on all that is trained."""
    full: bool = False
    """Whether all weights are trained: in float32, with bfloat16 products."""
    moves_ranks: bool = False
    """Whether ranks move between layers while it trains."""
    reading: Reading | None = None
    """What its base is calibrated on."""


@cache
def warm() -> None:
    """Adapts a tiny model, for which transformers and PEFT prepare what every later one finds: a second of patterns to
    compile, in the process of which each cell is a fork."""
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
    METHODS["lora"].wrap(model, Setting(1, 0, 1, "CAUSAL_LM"))


class MoveRanks(TrainerCallback):
    """Has PEFT's AdaLoRA move ranks between layers while the gradients are there, as its documentation asks."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)


def _peft(**fields: Any) -> Callable[[nn.Module, Setting], nn.Module]:
    def wrap(model: nn.Module, setting: Setting) -> nn.Module:
        torch.manual_seed(setting.seed)
        return get_peft_model(
            model,  # type: ignore[arg-type]
            LoraConfig(
                r=setting.r,
                target_modules=setting.target_modules,
                task_type=setting.task_type,
                rank_pattern=dict(setting.rank_pattern),
                alpha_pattern=dict(setting.rank_pattern),
                **{"lora_alpha": setting.r} | fields,
            ),
        )

    return wrap


def _adalora(model: nn.Module, setting: Setting) -> nn.Module:
    """Ranks start at 1.5 r and are pruned to r on average, as in its paper (arXiv 2303.10512)."""
    torch.manual_seed(setting.seed)
    first = max(2, round(1.5 * setting.r))
    return get_peft_model(
        model,  # type: ignore[arg-type]
        AdaLoraConfig(
            init_r=first,
            target_r=setting.r,
            lora_alpha=first,
            tinit=setting.steps // 5,
            tfinal=setting.steps // 3,
            total_step=setting.steps,
            target_modules=setting.target_modules,
            task_type=setting.task_type,
        ),
    )


def _ours(**fields: Any) -> Callable[[nn.Module, Setting], nn.Module]:
    def wrap(model: nn.Module, setting: Setting) -> nn.Module:
        given = fields | ({"seed": setting.seed} if fields.get("init") == "lora" else {})
        given |= {"target_modules": setting.target_modules, "task_type": setting.task_type}
        if setting.svd_passes == "exact":
            given |= {"init": EXACT.name}
        elif setting.svd_passes != "auto":
            return _removed(model, setting)
        config = PissaConfig(r=setting.r, rank_pattern=dict(setting.rank_pattern), **given)
        return pissa.wrap(model, config, calibration=setting.calibration)

    return wrap


def _nf4(**fields: Any) -> Callable[[nn.Module, Setting], nn.Module]:
    return _ours(quant="nf4", **fields)


def _repaired(label: str, reading: Reading = Reading(), **fields: Any) -> Method:  # noqa: B008
    """LoRA's start, or another one, on a calibrated base."""
    return Method(label, _ours(**{"init": "lora", "quant": "nf4"} | fields), dense=False, reading=reading)


def _removed(model: nn.Module, setting: Setting) -> nn.Module:
    """A method whose results are kept, but which pissa no longer has."""
    raise NotImplementedError("pissa no longer has this method; its results are in bench/results/experiments")


def _own_codes(model: nn.Module, setting: Setting) -> nn.Module:
    """LoRA's start on the file's own codes, in the place of the decoded model."""
    fields: dict[str, Any] = {"target_modules": setting.target_modules, "task_type": setting.task_type}
    assert setting.file is not None
    return pissa.load(setting.file, r=setting.r, init="lora", seed=setting.seed, dtype=torch.bfloat16, **fields)


def _everything(model: nn.Module, setting: Setting) -> nn.Module:
    return model.requires_grad_()


def _loraplus(model: Any, rate: float) -> Optimizer:
    return create_loraplus_optimizer(model, AdamW, lr=rate, loraplus_lr_ratio=LORAPLUS_RATIO, weight_decay=0.0)


RELEASED = ("mxfp4", "nvfp4", "int4", "fp8")
"""The formats in which models are released."""

METHODS: dict[str, Method] = {
    "lora": Method("LoRA", _peft()),
    "gaussian": Method("LoRA, Gaussian", _peft(init_lora_weights="gaussian")),
    "rslora": Method("rsLoRA", _peft(use_rslora=True)),
    "pissa": Method("PiSSA", _ours()),
    "unit": Method("orthonormal start", _ours(init=UNIT.name)),
    "dora": Method("DoRA", _peft(use_dora=True)),
    "olora": Method("OLoRA", _peft(init_lora_weights="olora")),
    "pissa_dora": Method("PiSSA + DoRA", _ours(use_dora=True)),
    "adalora": Method("AdaLoRA", _adalora, moves_ranks=True),
    "loraplus": Method("LoRA+", _peft(), optimizer=_loraplus),
    "full": Method("full", _everything, full=True),
    "medium": Method("medium components", _ours(init=MEDIUM.name)),
    "minor": Method("minor components", _ours(init=MINOR.name)),
    "lora_256": Method("LoRA, alpha 256", _peft(lora_alpha=256)),
    "pissa_64": Method("PiSSA, alpha 64", _ours(lora_alpha=64)),
    "pissa_256": Method("PiSSA, alpha 256", _ours(lora_alpha=256)),
    "qlora": Method("QLoRA", _nf4(init="lora"), dense=False),
    "loftq": Method("LoftQ, T = 5", _removed, dense=False),
    "qpissa_1": Method("QPiSSA, T = 1", _nf4(), dense=False),
    "qpissa_5": Method("QPiSSA, T = 5", _nf4(quant_iters=5), dense=False),
    "pissa_on_nf4": Method("PiSSA's start on nf4(W)", _nf4(repair="lora"), dense=False),
    "unit_on_nf4": Method("orthonormal start on nf4(W)", _nf4(init=UNIT.name, repair="lora"), dense=False),
    "lora_on_1": Method("LoRA's start on T = 1", _nf4(init="lora", repair="pissa"), dense=False),
    "lora_on_5": Method("LoRA's start on T = 5", _nf4(init="lora", repair="pissa", quant_iters=5), dense=False),
    "unit_on_1": Method("orthonormal start on T = 1", _nf4(init=UNIT.name, repair="pissa"), dense=False),
    "unit_on_5": Method("orthonormal start on T = 5", _nf4(init=UNIT.name, repair="pissa", quant_iters=5), dense=False),
    "repair_1": _repaired("repair, T = 1", repair="activations"),
    "repair_5": _repaired("repair, T = 5", repair="activations", quant_iters=5),
    "repair_diagonal": _repaired("diagonal repair", Reading(diagonal=True), repair="activations"),
    "feedback": _repaired("error feedback", error_feedback=True),
    "feedback_repair": _repaired("error feedback and repair", repair="activations", error_feedback=True),
    "pissa_on_repair": _repaired("PiSSA's start, repair", init="pissa", repair="activations"),
    "repair_prose": _repaired("repair, prose", Reading("prose"), repair="activations"),
    "repair_half": _repaired("repair, half prose", Reading("half"), repair="activations"),
    "repair_8": _repaired("repair, 8 examples", Reading(examples=8), repair="activations"),
    "repair_512": _repaired("repair, 512 examples", Reading(examples=512), repair="activations"),
    "nf3": Method("nf3(W)", _removed, dense=False),
    "nf3_repair": Method("nf3, repair", _removed, dense=False, reading=Reading()),
    "nf3_both": Method("nf3, both", _removed, dense=False, reading=Reading()),
    "nf2_both": Method("nf2, both", _removed, dense=False, reading=Reading()),
    "own_codes": Method("the file's own codes", _own_codes, dense=False),
    **{format: Method(f"{format}(W)", _ours(init="lora", quant=format), dense=False) for format in RELEASED},
}
