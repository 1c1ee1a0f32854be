"""A calibrated nf4 checkpoint in other programs: PEFT's LoRA on it, on bitsandbytes' own nf4, and on 32 bits.

    pissa init MODEL CALIBRATED --quant nf4 --init lora --calibration FOLDER/train.jsonl
    python -m bench.compare.plain_nf4 --gsm8k FOLDER --calibrated CALIBRATED --json bench/results/plain_nf4.json

MODEL is SmolLM2-135M-Instruct (bench.compare.weights.smollm2). FOLDER contains train.jsonl and test.jsonl of
openai/grade-school-math. transformers and bitsandbytes load each base, and PEFT puts LoRA of rank 16 on all linear
layers: 40 steps of 2 problems, AdamW at 2e-3, LoRA's best rate there. The loss is that of 40 held-out answers.
bitsandbytes is kept in training mode, because on a CPU its layers return no gradient once they have been in evaluation.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bench.compare.records import machine, write
from bench.compare.repair_loss import held_out_loss, mean_loss
from bench.experiments.experiment import Options
from bench.experiments.language_tasks import Row, load_task

STEPS, BATCH, RATE = 40, 2, 2e-3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare.plain_nf4",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gsm8k", type=Path, required=True, metavar="FOLDER", help="train.jsonl and test.jsonl")
    parser.add_argument("--calibrated", type=Path, required=True, metavar="DIR", help="what pissa init has written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of LoRA's start and the data (0 1 2)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every number there")
    return parser.parse_args()


def load(base: str, folder: Path, calibrated: Path) -> nn.Module:
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "use_cache": False}
    if base == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model: nn.Module = AutoModelForCausalLM.from_pretrained(calibrated if base == "calibrated" else folder, **options)
    return model.train().requires_grad_(False)


def train(model: nn.Module, rows: list[Row], seed: int) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 2) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        places = range(BATCH * step, BATCH * (step + 1))
        mean_loss(model, [rows[order[place % len(order)]] for place in places]).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")
    task = load_task("gsm8k", Options(data=(("gsm8k", options.gsm8k),)))
    rows = []
    for seed in options.seeds:
        for base in ("nf4", "calibrated", "32 bits"):
            model = load(base, task.folder, options.calibrated)
            before = held_out_loss(model, task.held_out)
            torch.manual_seed(seed)
            config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
            adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
            train(adapted, task.train, seed)
            after = held_out_loss(adapted, task.held_out)
            rows.append({"base": base, "seed": seed, "before": round(before, 4), "after": round(after, 4)})
            print(rows[-1], flush=True)
    if options.json:
        write(options.json, {"machine": machine(), "steps": STEPS, "rate": RATE, "rows": rows})


if __name__ == "__main__":
    main()
