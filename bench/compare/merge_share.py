"""Measures how much of a training is left after it is merged into the codes of its base.

    python -m bench.compare.merge_share --gsm8k FOLDER --json bench/results/merge_share.json mxfp4 model.gguf

A base is a format, to which the linear layers of SmolLM2-135M-Instruct are quantised, or a GGUF file. LoRA of rank 16
is trained on all linear layers as in `bench.compare.plain_nf4`, beside the base, and again with `merge_aware`
("through") or with it in the last tenth of the steps ("finish"). Held-out losses: of the base; of the adapter; merged
by `ops.merge_codes`, to the nearest codes and by dither, and both with error feedback by the inputs of 64 training
problems; and trained through the rounding, which is the merged model. "kept" is the share of the adapter's gain.
"share" and "noise" are what `pissa merge` says. An adapter that was trained through the rounding is also measured
beside the base.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM

import pissa
from bench.compare import plain_nf4
from bench.compare.plain_nf4 import BATCH, RATE, train
from bench.compare.records import machine, write
from bench.compare.repair_loss import held_out_loss
from bench.experiments.experiment import Options
from bench.experiments.language_tasks import Row, load_task, problems
from pissa import ops
from pissa.base.digest import seed_of
from pissa.base.weights import CodedLinear
from pissa.checkpoints.merge_codes import Kept
from pissa.containers.checkpoint import ModelFolder
from pissa.layers.layer import pissa_layers
from pissa.model.calibrate import observe

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROUNDINGS = {
    "nearest": ("nearest", 1, False),
    "dither": ("dither", 3, False),
    "feedback": ("nearest", 1, True),
    "feedback, dither": ("dither", 3, True),
}
"""For each way to merge, the rounding, the number of draws, and whether there is error feedback."""
CALIBRATED = 64
"""Problems of the training whose inputs are read for the feedback."""
FIELDS: dict[str, Any] = {"r": 16, "init": "lora", "target_modules": LINEAR, "task_type": "CAUSAL_LM"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare.merge_share",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bases", nargs="+", help="formats, or GGUF files")
    parser.add_argument("--gsm8k", type=Path, required=True, metavar="FOLDER", help="train.jsonl and test.jsonl")
    parser.add_argument("--steps", type=int, default=plain_nf4.STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of LoRA's start and the data (0)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every number there")
    return parser.parse_args()


def load(base: str, folder: Path, aware: bool) -> Any:
    if base.endswith(".gguf"):
        return pissa.load(base, dtype=torch.float32, merge_aware=aware, **FIELDS).train()
    dense: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense.config.use_cache = False
    model = pissa.wrap(dense, **FIELDS)
    for layer in pissa_layers(dense).values():
        layer.base_layer = CodedLinear(ops.quantize(layer.base.parameter, base), layer.base.bias)
        layer.merge_aware = {"default"} if aware else set()
    return model.train()


@contextmanager
def merged(model: Any, rounding: str, moments: Mapping[str, Tensor], draw: int = 0) -> Iterator[dict[str, float]]:
    """The model without its adapter, and with its change in the codes, by error feedback for layers with a second
    moment. Yields the sums of `ops.Merged`."""
    sums, before = dict.fromkeys(("change", "along", "square", "moved", "beyond", "elements"), 0.0), {}
    for name, layer in pissa_layers(model.base_model.model).items():
        start, scaling = layer.start_of("default"), layer.scaling["default"]
        a, b = (factor.detach() for factor in start.factors_of_change(layer.deltas("default")))
        if not layer.base.is_quantised:
            continue
        held = layer.base.quantized
        seed, moment = seed_of(name) ^ draw, moments.get(name)
        new = ops.merge_codes(held, a, b, scaling, rounding=rounding, second_moment=moment, seed=seed)
        for field in ("change", "along", "square", "moved", "beyond"):
            sums[field] += getattr(new, field)
        sums["elements"] += held.shape[0] * held.shape[1]
        before[name] = layer.base.weight.data
        layer.base.weight.data = new.weight.codes
    try:
        with model.disable_adapter():
            yield sums
    finally:
        for name, codes in before.items():
            pissa_layers(model.base_model.model)[name].base.weight.data = codes


def measure(base: str, folder: Path, rows: tuple[list[Row], list[Row]], seed: int) -> dict[str, Any]:
    """The held-out losses of one base and seed."""
    training, held_out = rows
    losses: dict[str, Any] = {}
    for way in ("adapter", "through", "finish"):
        torch.manual_seed(seed)
        model = load(base, folder, aware=way != "adapter")
        layers = pissa_layers(model.base_model.model).values()
        if way == "adapter":
            with model.disable_adapter():
                losses["base"] = held_out_loss(model, held_out)
        with last_tenth(layers) if way == "finish" else nullcontext():
            train(model, training, seed)
        losses[way] = held_out_loss(model, held_out)
        if way == "through":
            for layer in layers:
                layer.merge_aware.clear()
            losses["through, beside the base"] = held_out_loss(model, held_out)
        if way == "adapter":
            losses |= merges(model, [torch.tensor([row["input_ids"]]) for row in training[:CALIBRATED]], held_out)
    gain = losses["base"] - losses["adapter"]
    for way in (*ROUNDINGS, "through", "finish"):
        found = torch.tensor(losses[way]).mean()  # of the draws
        losses[f"kept, {way}"] = round((losses["base"] - float(found)) / gain, 4)
    return losses


def merges(model: Any, calibration: list[Tensor], held_out: list[Row]) -> dict[str, Any]:
    """The held-out losses of a model's adapter, merged in every way, and what dither keeps of it."""
    moments = observe(model, calibration, progressbar=False).moments
    model.train()
    losses: dict[str, Any] = {}
    for way, (rounding, draws, feedback) in ROUNDINGS.items():
        drawn = []
        for draw in range(draws):
            with merged(model, rounding, moments if feedback else {}, draw) as sums:
                drawn.append(held_out_loss(model, held_out))
        losses[way] = drawn if draws > 1 else drawn[0]
        if way == "dither":
            losses |= {name: round(value, 5) for name, value in Kept.of(sums)._asdict().items()}
    return losses


@contextmanager
def last_tenth(layers: Iterable[Any]) -> Iterator[None]:
    """Until the last tenth of the steps, layers compute with the adapter beside the base."""
    for layer in layers:
        layer.merge_aware.clear()
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == plain_nf4.STEPS * 9 // 10:
            for layer in layers:
                layer.merge_aware.add("default")

    hook = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        hook.remove()


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")
    plain_nf4.STEPS = options.steps
    given = Options(data=(("gsm8k", options.gsm8k),))
    rows = []
    for base in options.bases:
        task = load_task("gsm8k", given)
        texts = task.train, task.held_out
        if base.endswith(".gguf"):
            texts = problems(options.gsm8k, ModelFolder.open(Path(base)).tokenizer())
        for seed in options.seeds:
            found = measure(base, task.folder, texts, seed)
            rows.append({"of": Path(base).name, "steps": options.steps, "seed": seed, **found})
            print(rows[-1], flush=True)
    if options.json:
        about = {"machine": machine(), "batch": BATCH, "rate": RATE}
        write(options.json, {**about, "rows": rows})


if __name__ == "__main__":
    main()
