"""Trains one adapter and measures what it has learned: a line of JSON for a method, a model, a rate and a seed.

    python -m bench.learn --method pissa --rate 2e-4 --seed 0 --task gsm8k --data FOLDER
    python -m bench.learn --method lora --rate 2e-3 --model model.gguf --task sums --base own
    python -m bench.learn --method lora --rate 1e-3 --task reviews --data FOLDER --base nf4 --precision int8

The protocol is the same for all. Examples are questions with answers that need no cut; a seed draws LoRA's start and
the order of the examples, which all methods share. AdamW without decay trains in bfloat16, with the adapter in float32
on all linear layers, on the mean loss of the answers' tokens. The rate rises for 2 steps and falls by a cosine; the
gradient's norm is cut at 1. `loss` is the held-out loss, a mean over tokens. `right` is the share of held-out problems
whose greedy answer ends with the right number. A line has everything that a run depends on as its "cell"; a run whose
cell is in the file already is skipped. Choose the rate of each method by one seed, and compare by others.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

import bench.starts  # noqa: F401  completes pissa.INIT_METHODS
import pissa
from bench import demo
from bench.compare.records import machine, version
from bench.compare.weights import smollm2
from bench.packages import required_package
from pissa.cli.data import IGNORED, encode, read_chats
from pissa.cli.sources import records
from pissa.cli.templates import Chat, end_of_answer
from pissa.cli.terminal import UserError, silence_third_parties
from pissa.containers.checkpoint import ModelFolder
from pissa.model.pissa_model import PRECISIONS
from pissa.ops.formats import FORMATS

Row = dict[str, list[int]]

PACKAGES = ("pissa", "torch", "transformers", "peft")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"init": "lora"},
    "rslora": {"init": "lora", "use_rslora": True},
    "pissa": {},
    "minor": {"init": "minor"},
    "orthonormal": {"init": "orthonormal"},
}
"""Fields of `PissaConfig`; alpha is the rank."""
BASES = ("dense", "own", *FORMATS)
CALIBRATED = 64
"""Examples of the training that a base is calibrated on, where `--set` asks for it."""


class Task(NamedTuple):
    """Chats for training and held-out ones, and the sizes that are fixed for them."""

    chats: Callable[[Path | None], tuple[list[Chat], list[Chat]]]
    batch: int
    longest: int
    """Tokens of an example."""
    held_out: int
    answer: int
    """Tokens of a generated answer."""


def _gsm8k(folder: Path | None) -> tuple[list[Chat], list[Chat]]:
    """Grade-school problems with worked answers (openai/grade-school-math): train.jsonl and test.jsonl."""
    if folder is None or not (folder / "train.jsonl").is_file():
        raise UserError(
            f"the task gsm8k needs --data: the folder with GSM8K's train.jsonl and test.jsonl; got {folder}"
        )
    train, test = (read_chats(records(str(folder / f"{part}.jsonl"))) for part in ("train", "test"))
    return train, test


def _reviews(folder: Path | None) -> tuple[list[Chat], list[Chat]]:
    """Snippets of film reviews and the signs of people's ratings (C. Hutto and E. Gilbert, ICWSM 2014)."""
    if folder is None or not (folder / demo.REVIEWS).is_file():
        raise UserError(f"the task reviews needs --data: the folder with {demo.REVIEWS}; got {folder}")
    chats = read_chats(records("reviews", rows=demo.read_reviews(folder / demo.REVIEWS)))
    return chats[200:], chats[:200]


def _sums(folder: Path | None) -> tuple[list[Chat], list[Chat]]:
    """Sums and differences of two numbers of one or two digits, each once."""
    required_package("reasoning_gym", "reasoning-gym")
    import reasoning_gym

    sizes = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "allow_parentheses": False}
    made = reasoning_gym.create_dataset("basic_arithmetic", seed=1, size=4000, operators=["+", "-"], **sizes)
    answers = {entry["question"]: entry["answer"] for entry in made}
    rows = ({"question": question, "answer": answer} for question, answer in answers.items())
    chats = read_chats(records("sums", rows=rows))
    return chats[200:], chats[:200]


TASKS = {
    "gsm8k": Task(_gsm8k, 4, 160, 100, 160),
    "sums": Task(_sums, 8, 64, 200, 8),
    "reviews": Task(_reviews, 8, 100, 200, 8),
}


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument(
        "--model", help="folder, GGUF file or name on the hub (SmolLM2-135M-Instruct, from its package)"
    )
    parser.add_argument("--rate", type=_positive, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", choices=TASKS, default="sums")
    data = f"of gsm8k: train.jsonl and test.jsonl; of reviews: {demo.REVIEWS}"
    parser.add_argument("--data", type=Path, metavar="FOLDER", help=data)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--base", choices=BASES, default="dense", help="the format; own: as the model's files have it")
    parser.add_argument(
        "--set", type=_field, nargs="*", default=[], metavar="FIELD=VALUE", help="of PissaConfig, such as quant_iters=5"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="float", help="of products with the base (float)")
    parser.add_argument("--answers", type=int, default=0, metavar="N", help="held-out problems to be answered (0)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "learn.jsonl", metavar="FILE")
    args = parser.parse_args(given)
    for name, least in (("steps", 3), ("rank", 1), ("seed", 0), ("answers", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: at least {least}")
    try:
        config_of(args)
    except (TypeError, ValueError) as error:
        parser.error(f"--set: {error}")
    return args


def _positive(text: str) -> float:
    rate = float(text)
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a learning rate is above 0 and finite, such as 2e-4")
    return rate


def _field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: needs FIELD=VALUE, such as quant_iters=5")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def config_of(args: argparse.Namespace) -> pissa.PissaConfig:
    fields = METHODS[args.method] | {"r": args.rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if args.base in FORMATS:
        fields["quant"] = args.base
    if fields.get("init") == "lora":
        fields["seed"] = args.seed
    return pissa.PissaConfig(**fields | dict(args.set))


def cell_of(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that a run depends on, apart from the machine."""
    names = ("method", "rate", "seed", "task", "steps", "rank", "base", "precision", "answers")
    model = Path(args.model).name if args.model else "SmolLM2-135M-Instruct"
    return {"model": model, **{name: getattr(args, name) for name in names}, "set": dict(args.set)}


def prepare(args: argparse.Namespace, folder: str | Path, training: list[Row]) -> Any:
    """The model with its adapter, in training mode."""
    config, calibration = config_of(args), None
    if args.base == "own":
        return pissa.load(folder, config, dtype=torch.bfloat16, precision=args.precision).train()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_cache=False)
    if config.needs_calibration:
        calibration = [torch.tensor([row["input_ids"]]) for row in training[:CALIBRATED]]
    return pissa.wrap(model, config, calibration=calibration, precision=args.precision).train()


def loss(model: Any, rows: list[Row]) -> tuple[Tensor, int]:
    """The sum over the answers' tokens, and their number."""
    longest = max(len(row["input_ids"]) for row in rows)
    blank = {"input_ids": 0, "labels": IGNORED}  # behind an answer, where nothing reads it
    ids, labels = (torch.tensor([r[k] + [blank[k]] * (longest - len(r[k])) for r in rows]) for k in blank)
    count = int((labels[:, 1:] != IGNORED).sum())
    return model(input_ids=ids, labels=labels).loss * count, count


@torch.no_grad()
def held_out_loss(model: Any, rows: list[Row]) -> float:
    sums = [loss(model.eval(), rows[i : i + 8]) for i in range(0, len(rows), 8)]
    return float(sum(total for total, _ in sums)) / sum(count for _, count in sums)


def train(model: Any, rows: list[Row], args: argparse.Namespace) -> None:
    batch, order = TASKS[args.task].batch, random.Random(args.seed)
    drawn = [row for _ in range(1 + args.steps * batch // len(rows)) for row in order.sample(rows, len(rows))]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, args.steps)
    model.train()
    for step in range(args.steps):
        total, count = loss(model, drawn[step * batch : (step + 1) * batch])
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def share_right(model: Any, tokenizer: Any, rows: list[Row], length: int) -> float:
    """The share of greedy answers whose last number is that of the example's answer."""
    model.eval()
    right = 0
    for row in rows:
        start = row["labels"].count(IGNORED)
        prompt = torch.tensor([row["input_ids"][:start]])
        ends = {"eos_token_id": end_of_answer(tokenizer), "pad_token_id": tokenizer.eos_token_id}
        found = model.generate(input_ids=prompt, max_new_tokens=length, do_sample=False, use_cache=True, **ends)
        answer, expected = (
            re.findall(r"-?\d+", tokenizer.decode(ids, skip_special_tokens=True).replace(",", ""))
            for ids in (found[0, start:], row["input_ids"][start:])
        )
        right += answer[-1:] == expected[-1:]
    return right / len(rows)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures."""
    task, folder = TASKS[args.task], args.model or smollm2()
    tokenizer = ModelFolder.open(folder).tokenizer()
    training, held_out = (
        [row for row in encode(chats, tokenizer, task.longest + 1)[0] if len(row["input_ids"]) <= task.longest]
        for chats in task.chats(args.data)
    )
    if not (training and held_out):
        raise UserError(f"no example of the task {args.task} has at most {task.longest} tokens of this model's")
    held_out, asked = held_out[: task.held_out], held_out[: args.answers]
    if len(asked) < args.answers:
        raise UserError(f"--answers {args.answers}: the task {args.task} holds out {len(held_out)} problems; ask fewer")
    begun = time.perf_counter()
    model = prepare(args, folder, training)
    started = time.perf_counter()
    result: dict[str, Any] = {"before": held_out_loss(model, held_out)}
    measured = time.perf_counter()
    train(model, training, args)
    result["seconds"] = {"start": started - begun, "training": time.perf_counter() - measured}
    result["loss"] = held_out_loss(model, held_out)
    if asked:
        result["right"] = share_right(model, tokenizer, asked, task.answer)
    return result


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(sys.argv[1:] if given is None else given)
    silence_third_parties()
    cell = cell_of(args)
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if any(line["cell"] == cell for line in known):
        print(f"known already, in {args.out}: {json.dumps(cell)}")
        return
    try:
        result = run(args)
    except (UserError, OSError, ValueError) as error:
        raise SystemExit(f"nothing was measured: {error}") from error
    packages = {name: version(name) for name in PACKAGES}
    line = json.dumps({"cell": cell, "result": result, "machine": machine(), "packages": packages})
    with args.out.open("a") as file:
        file.write(f"{line}\n")
    print(line)


if __name__ == "__main__":
    main()
