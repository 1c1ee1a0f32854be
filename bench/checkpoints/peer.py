"""Makes a QPiSSA checkpoint in the way of the paper's authors, with transformers, PEFT and bitsandbytes.

    python -m bench.checkpoints.peer SRC OUT --rank 16

The model is loaded, `init_lora_weights="pissa_niter_4"` splits its layers, and adapter and residual model are saved.
The residual model is then loaded again in 4 bits and saved.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints.peer", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype: torch.dtype = getattr(torch, options.dtype)
    residual = options.out / "residual"
    model = AutoModelForCausalLM.from_pretrained(options.source, dtype=dtype)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        init_lora_weights="pissa_niter_4",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].init_lora_weights = True  # the saved adapter lies on the residual model
    adapted.save_pretrained(options.out / "pissa_init")
    adapted.unload().save_pretrained(residual)
    del adapted, model
    quantised = AutoModelForCausalLM.from_pretrained(
        residual,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    quantised.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.source).save_pretrained(options.out)
    shutil.rmtree(residual)


if __name__ == "__main__":
    main()
