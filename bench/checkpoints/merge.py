"""Merges into the codes of bases with random weights: seconds beside those of a copy of the files, and memory.

    python -m bench.checkpoints.merge measure --work DIR --json bench/results/merge_models.json

The bases are Qwen2.5-7B's shapes in a GGUF file in Q4_K_M (4.7 GB), the same with 4 of 28 layers in bitsandbytes' NF4,
and gpt-oss-20b in MXFP4 (13.8 GB). The adapter is LoRA on all linear layers and experts, with random B: of rank 16, on
gpt-oss of rank 4. Each merge has its own process. A copy is made before, of files that are in the system's cache as far
as they have room there.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from bench.checkpoints import gguf, released
from bench.checkpoints.processes import run_module
from bench.checkpoints.timed import note
from bench.compare.records import machine, write

SHAPES = ("7B, Q4_K_M", "7B, 4 layers, nf4", "gpt-oss-20b, mxfp4")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.checkpoints.merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure")
    measure.add_argument("--work", type=Path, required=True, metavar="DIR", help="where files are made, then removed")
    measure.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    measure.add_argument("--layers", type=int, help="instead of all (28, 24)")
    measure.add_argument("--json", type=Path, metavar="PATH", help="write every number there")
    for name in ("adapter", "one"):  # in their own processes
        one = commands.add_parser(name)
        one.add_argument("base", type=Path)
        one.add_argument("run", type=Path)
        one.add_argument("--rank", type=int)
        one.add_argument("--target", type=Path)
    return parser.parse_args()


def make(shape: str, work: Path, layers: int | None) -> Path:
    """Writes the base."""
    if shape == "7B, Q4_K_M":
        gguf.make(work / "base.gguf", layers or gguf.SHAPE["layers"])
        return work / "base.gguf"
    if shape == "gpt-oss-20b, mxfp4":
        released.make("gpt-oss-20b", work / "base", layers or 24)
        return work / "base"
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import pissa
    from pissa.checkpoints.merge import merge

    sizes = {"hidden_size": gguf.SHAPE["hidden"], "intermediate_size": gguf.SHAPE["inner"], "num_hidden_layers": 4}
    heads = {"num_attention_heads": gguf.SHAPE["heads"], "num_key_value_heads": gguf.SHAPE["key_heads"]}
    config = Qwen2Config(**sizes, **heads, vocab_size=1024, dtype="bfloat16")
    model: Any = Qwen2ForCausalLM(config).bfloat16()
    model.save_pretrained(work / "dense")
    pissa.wrap(model, r=1, init="lora", target_modules=["q_proj"]).save_pretrained(work / "nothing")
    del model
    merge(work / "nothing", work / "dense", work / "base", quant="nf4")
    return work / "base"


def write_adapter(options: argparse.Namespace) -> None:
    """A LoRA that changes every layer, as much as a short training."""
    import pissa

    fields: dict[str, Any] = {"r": options.rank, "init": "lora", "target_modules": "all-linear"}
    model = pissa.load(options.base, dtype=torch.bfloat16, task_type="CAUSAL_LM", **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    model.save_pretrained(options.run)


def merge_one(options: argparse.Namespace) -> None:
    import pissa
    from pissa.checkpoints.merge import merge

    begun = time.perf_counter()
    if options.base.suffix == ".gguf":
        kept = pissa.export(options.run, options.target, "gguf-model", base=options.base).kept
    else:
        kept = merge(options.run, options.base, options.target, quant="same").kept
    assert kept is not None
    note(seconds=time.perf_counter() - begun, kept=kept._asdict())


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for shape in options.shapes:
        work = options.work / "merge"
        work.mkdir()
        try:
            base = make(shape, work, options.layers)
            rank = 4 if shape.startswith("gpt-oss") else 16
            run_module("bench.checkpoints.merge", "adapter", base, work / "run", "--rank", rank)
            begun = time.perf_counter()
            (shutil.copyfile if base.is_file() else shutil.copytree)(base, work / f"copy{base.suffix}")
            copy = time.perf_counter() - begun
            (Path.unlink if base.is_file() else shutil.rmtree)(work / f"copy{base.suffix}")
            target = work / f"merged{base.suffix}"
            usage = run_module("bench.checkpoints.merge", "one", base, work / "run", "--target", target)
            files = [base] if base.is_file() else list(base.glob("*.safetensors"))
            size = sum(path.stat().st_size for path in files) / 1e9
            memory = {"private_gb": usage.private / 1e9, "mapped_gb": usage.mapped / 1e9}
            rows.append({"base": shape, "gb": size, "rank": rank, "copy": copy, **usage.report, **memory})
            print(rows[-1], flush=True)
        finally:
            shutil.rmtree(work)
    return rows


def main() -> None:
    options = arguments()
    if options.command == "adapter":
        write_adapter(options)
    elif options.command == "one":
        merge_one(options)
    else:
        rows = measure(options)
        if options.json:
            write(options.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
