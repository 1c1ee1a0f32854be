"""Measures what a quantised base loses before training, with each repair: SmolLM2's loss on GSM8K answers and prose.

    python -m bench.compare.repair_loss --gsm8k FOLDER --json bench/results/repair_loss.json
    python -m bench.compare.repair_loss --formats int8 --calibration gsm8k --only plain feedback

FOLDER contains train.jsonl and test.jsonl of openai/grade-school-math. r = 16, and blocks of 64 have nested scales. The
losses are on 40 held-out answers, and on 12 rows of 96 tokens of a story. The calibration is 64 training problems, or
64 rows of 96 tokens from a later part of the story, or 32 of each. All of them use the model in 32 bits, whose
packaged weights lie on a 4-bit grid. The committed file also has rows of LoftQ, and of NormalFloats of 3 and 2 bits,
which pissa no longer has.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import pissa
from bench.compare.records import machine, write
from bench.experiments.experiment import Options
from bench.experiments.language_tasks import LanguageTask, Row, load_task

EXAMPLES = 64
REPAIRS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qpissa": {"repair": "pissa"},
    "qpissa, T = 5": {"repair": "pissa", "quant_iters": 5},
    "activations": {"repair": "activations"},
    "activations, T = 5": {"repair": "activations", "quant_iters": 5},
    "feedback": {"error_feedback": True},
    "feedback, activations": {"error_feedback": True, "repair": "activations"},
    "feedback, activations, T = 5": {"error_feedback": True, "repair": "activations", "quant_iters": 5},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare.repair_loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gsm8k", type=Path, required=True, metavar="FOLDER", help="train.jsonl and test.jsonl")
    parser.add_argument("--formats", nargs="+", default=["nf4"], help="formats of the base (nf4)")
    parser.add_argument("--calibration", nargs="+", default=["gsm8k", "prose", "half"], help="what is read (all three)")
    parser.add_argument("--only", nargs="+", choices=REPAIRS, default=list(REPAIRS), help="the repairs (all)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the repair (16)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every number there")
    return parser.parse_args()


def load(folder: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def mean_loss(model: nn.Module, rows: list[Row]) -> Tensor:
    """The mean loss over the tokens that count."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[0, :-1].float()
        total = total + nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
        count += int((labels[0, 1:] != -100).sum())
    return total / count


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: list[Row]) -> float:
    return float(mean_loss(model, rows))


def batches(task: LanguageTask, what: str) -> list[Tensor]:
    rows = task.texts("task" if what == "gsm8k" else what, EXAMPLES)
    return [torch.tensor([row["input_ids"]]) for row in rows]


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")
    given = Options(data=(("gsm8k", options.gsm8k),))
    task = load_task("gsm8k", given)
    rows = []

    def record(model: nn.Module, **fields: Any) -> None:
        measured = {"gsm8k": held_out_loss(model, task.held_out), "prose": held_out_loss(model, task.unrelated)}
        rows.append({**fields, **{f"loss on {name}": round(value, 4) for name, value in measured.items()}})
        print(rows[-1], flush=True)

    record(load(task.folder), format="f32", repair="none", calibration=None)
    found: dict[str, pissa.Calibration] = {}
    for what in options.calibration:
        begun = time.perf_counter()
        found[what] = pissa.calibrate(load(task.folder), batches(task, what))
        print(f"calibrated on {what}: {found[what].tokens} tokens, {time.perf_counter() - begun:.1f} s", flush=True)
    for name in options.formats:
        for repair in options.only:
            config = pissa.PissaConfig(r=options.rank, quant=name, init="lora", **{"repair": None, **REPAIRS[repair]})
            for what in options.calibration if config.needs_calibration else [None]:
                calibration = None if what is None else found[what]
                model = pissa.wrap(load(task.folder), config, calibration=calibration)
                record(model, format=name, repair=repair, calibration=what)
    if options.json:
        write(options.json, {"machine": machine(), "rank": options.rank, "examples": EXAMPLES, "rows": rows})


if __name__ == "__main__":
    main()
