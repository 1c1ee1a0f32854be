"""Fine-tune language models with PiSSA (arXiv 2404.02948): the principal singular components of each weight become the
adapter, the rest is frozen, and kept in 4 bits if asked (QPiSSA).

    model = pissa.wrap(model, r=16)                  # PiSSA
    model = pissa.wrap(model, r=16, quant="nf4")     # QPiSSA

`pissa.ops` has the core as functions on tensors and needs only torch; the adapter API needs `pip install "pissa[hf]"`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import ops
from .ops import build_info

if TYPE_CHECKING:
    from .config import PissaConfig
    from .conversion import convert
    from .layer import PissaLayer
    from .linear import PissaLinear
    from .model import PissaModel, wrap
    from .stored import Nf4Linear

__version__: str = build_info()["version"]

__all__ = [
    "Nf4Linear",
    "PissaConfig",
    "PissaLayer",
    "PissaLinear",
    "PissaModel",
    "__version__",
    "build_info",
    "convert",
    "ops",
    "wrap",
]

_HOMES = {
    "Nf4Linear": "stored",
    "PissaConfig": "config",
    "PissaLayer": "layer",
    "PissaLinear": "linear",
    "PissaModel": "model",
    "convert": "conversion",
    "wrap": "model",
}


def __getattr__(name: str) -> Any:  # peft and transformers are imported when the adapter API is first used
    if name not in _HOMES:
        raise AttributeError(f"module 'pissa' has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name in ("peft", "transformers", "accelerate", "safetensors", "huggingface_hub", "tqdm", "xxhash"):
            raise ModuleNotFoundError(
                f'pissa.{name} needs {error.name}, which is not installed: run `pip install "pissa[hf]"`',
                name=error.name,
            ) from error
        raise
