"""Measures how much of a trained change is left after it is merged into the format of its base and rounded.

    python -m bench.compare.merge_share --gsm8k FOLDER --json bench/results/merge_share.json

SmolLM2-135M-Instruct is quantised to each format and trained as in `bench.compare.plain_nf4`. Then base and change are
added, rounded to the nearest codes under the base's scales, and the adapter is removed. The share of a change D that
survives is <Q - W, D> / <D, D>, where W is before and Q after, over all layers. "noise" is the rest of the difference,
relative to D: |Q - W - share D| / |D|.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import pissa
from bench.compare.plain_nf4 import RATE, STEPS, train
from bench.compare.records import machine, write
from bench.compare.repair_loss import held_out_loss
from bench.experiments.experiment import Options
from bench.experiments.language_tasks import load_task
from pissa import ops
from pissa.layers.layer import pissa_layers

FORMATS = ("mxfp4", "nvfp4", "int4", "fp8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare.merge_share",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gsm8k", type=Path, required=True, metavar="FOLDER", help="train.jsonl and test.jsonl")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every number there")
    return parser.parse_args()


def nearest_codes(weight: torch.Tensor, held: ops.QuantizedWeight) -> ops.QuantizedWeight:
    """Returns a weight [out, in] in the codes nearest to it under the scales of `held`, which has a format of released
    models. It is error feedback that passes no error on, 128 columns at a time."""
    columns, blocksize = held.shape[1], held.blocksize
    scales = held.absmax.view(-1, -(-columns // blocksize))
    codes = []
    for first in range(0, columns, 128):
        part = weight[:, first : first + 128]
        width = part.shape[1]
        own = scales[:, first // blocksize : -(-(first + width) // blocksize)].reshape(-1)
        apart = torch.eye(width, device=weight.device)
        size = blocksize if blocksize <= 128 else width  # otherwise each row has one scale
        codes.append(torch.ops.pissa.feedback_codes(part, apart, own, *held[2:5], size).view(len(weight), -1))
    return held._replace(codes=torch.cat(codes, 1).view(-1))


@torch.no_grad()
def merge(model: Any) -> dict[str, float]:
    """Puts the change of every layer into its codes. Returns the share that survives, and the noise."""
    dots = squares = lost = 0.0
    for layer in pissa_layers(model.base_model.model).values():
        base: Any = layer.base_layer
        before, change = ops.dequantize(base.residual), layer.get_delta_weight("default").float()
        merged = nearest_codes(before + change, base.residual)
        moved = (ops.dequantize(merged) - before).double()
        base.weight.copy_(merged.codes.view(base.weight.dtype))
        dots += (moved * change).sum().item()
        squares += change.double().square().sum().item()
        lost += moved.square().sum().item()
    share = dots / squares
    return {"share": round(share, 4), "noise": round(math.sqrt(max(0.0, lost / squares - share**2)), 4)}


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")
    task = load_task("gsm8k", Options(data=(("gsm8k", options.gsm8k),)))
    rows = []
    for format in options.formats:
        dense = AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32, attn_implementation="eager")
        dense.config.use_cache = False
        model = pissa.wrap(dense, r=16, init="lora", quant=format, task_type="CAUSAL_LM").train()
        losses = {"before": held_out_loss(model, task.held_out)}
        train(model, task.train, 0)
        losses["adapter"] = held_out_loss(model, task.held_out)
        found = merge(model)
        with model.disable_adapter():
            losses["merged"] = held_out_loss(model, task.held_out)
        rows.append({"format": format, **{name: round(loss, 4) for name, loss in losses.items()}, **found})
        print(rows[-1], flush=True)
    if options.json:
        write(options.json, {"machine": machine(), "steps": STEPS, "rate": RATE, "rows": rows})


if __name__ == "__main__":
    main()
