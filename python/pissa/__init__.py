"""Fine-tune language models on a CPU: LoRA and PiSSA, with the weights in 16, 8 or 4 bits, behind PEFT's interface. In
PiSSA (arXiv 2404.02948) the principal singular components of each weight become the adapter, and the rest is frozen, in
4 bits if requested (QPiSSA).

    model = pissa.wrap(model, r=16)                  # PiSSA
    model = pissa.wrap(model, r=16, quant="nf4")     # QPiSSA
    model = pissa.load("folder")                     # of a checkpoint that `pissa init` has split on disk

`pissa.ops` contains the core as functions on tensors and needs only torch. The adapter API needs the packages
of the extra pissa[hf]: PEFT, transformers, accelerate and what these need.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pissa import layers as layers
    from pissa import ops as ops
    from pissa.base import bitsandbytes as bitsandbytes
    from pissa.base.init_methods import INIT_METHODS as INIT_METHODS
    from pissa.base.init_methods import InitMethod as InitMethod
    from pissa.base.init_methods import StartTask as StartTask
    from pissa.base.start import Origin as Origin
    from pissa.base.start import StartFactors as StartFactors
    from pissa.checkpoints.load import load as load
    from pissa.config import PissaConfig as PissaConfig
    from pissa.containers.staged import CompletedError as CompletedError
    from pissa.conversion.convert import convert as convert
    from pissa.distributed import RankError as RankError
    from pissa.integrations.export import export as export
    from pissa.model.calibrate import calibrate as calibrate
    from pissa.model.calibration import Calibration as Calibration
    from pissa.model.pissa_model import PissaModel as PissaModel
    from pissa.model.wrap import wrap as wrap
    from pissa.ops import build_info as build_info
    from pissa.training.lora_state import lora_config as lora_config
    from pissa.training.lora_state import lora_state_dict as lora_state_dict
    from pissa.training.suggest_lr import suggest_lr as suggest_lr

    __version__: str

# module:name, or a module. Each is imported on first use: `pissa.ops` needs neither peft nor transformers, and `pissa
# --help` does not even need torch.
_HOMES = {
    "INIT_METHODS": "pissa.base.init_methods:INIT_METHODS",
    "InitMethod": "pissa.base.init_methods:InitMethod",
    "Origin": "pissa.base.start:Origin",
    "StartFactors": "pissa.base.start:StartFactors",
    "StartTask": "pissa.base.init_methods:StartTask",
    "CompletedError": "pissa.containers.staged:CompletedError",
    "PissaConfig": "pissa.model.wrap:PissaConfig",  # completes it: reader, tuner, PEFT's way to a model
    "PissaModel": "pissa.model.pissa_model:PissaModel",
    "RankError": "pissa.distributed:RankError",
    "Calibration": "pissa.model.calibration:Calibration",
    "calibrate": "pissa.model.calibrate:calibrate",
    "bitsandbytes": "pissa.base.bitsandbytes:",
    "build_info": "pissa.ops:build_info",
    "convert": "pissa.conversion.convert:convert",
    "export": "pissa.integrations.export:export",
    "layers": "pissa.layers:",
    "load": "pissa.checkpoints.load:load",
    "lora_config": "pissa.training.lora_state:lora_config",
    "lora_state_dict": "pissa.training.lora_state:lora_state_dict",
    "ops": "pissa.ops:",
    "suggest_lr": "pissa.training.suggest_lr:suggest_lr",
    "wrap": "pissa.model.wrap:wrap",
}

__all__ = ["__version__", *_HOMES]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return resolve_name("pissa.ops:build_info")()["version"]
    if name not in _HOMES:
        raise AttributeError(f"module 'pissa' has no attribute {name!r} [P003]")
    try:
        return resolve_name(_HOMES[name])
    except ModuleNotFoundError as error:
        if error.name in ("peft", "transformers", "accelerate", "safetensors", "huggingface_hub", "tqdm", "xxhash"):
            raise ModuleNotFoundError(
                f"pissa.{name} needs {error.name}, which is not installed: run `pip install {error.name}`, or install "
                "pissa[hf] [P002]",
                name=error.name,
            ) from error
        raise
