"""Models as they are released, with random weights: what pissa.load and a training step take.

    python -m bench.checkpoints.released --work DIR --json bench/results/released_models.json

The models are gpt-oss-20b in its exact tensors (13.8 GB), a block of DeepSeek-V3 in FP8 with 24 of its experts, and a
block of Kimi K2 in INT4 with 72. Both blocks are compared with the same block in bfloat16. A step is that of
`bench.checkpoints.step`, 512 tokens. Each model has its own process. Folders are made when needed, then removed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GptOssConfig, GptOssForCausalLM

from bench.checkpoints.processes import run_module
from bench.compare.records import machine, write
from pissa import ops

SHAPES = ("gpt-oss-20b", "deepseek-v3 fp8", "deepseek-v3 bf16", "kimi-k2 int4", "kimi-k2 bf16")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.checkpoints.released",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where folders are made")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--layers", type=int, default=24, help="of gpt-oss (24)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every number there")
    return parser.parse_args()


def noise(shape: tuple[int, ...]) -> Tensor:
    """A few million random numbers, repeated."""
    some = torch.randn(min(math.prod(shape), 1 << 22)) * 0.02
    return some.repeat(-(-math.prod(shape) // len(some)))[: math.prod(shape)].view(shape).bfloat16()


def gpt_oss(layers: int) -> tuple[Any, Iterator[tuple[str, dict[str, Tensor]]], str]:
    """The configuration, tensors shard by shard, and what config.json calls the format."""
    config = GptOssConfig(num_hidden_layers=layers, num_local_experts=32, vocab_size=201088)
    with torch.device("meta"):
        model = GptOssForCausalLM(config)

    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for index, (name, meta) in enumerate(model.state_dict().items()):
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                number, columns, rows = meta.shape
                blocks = torch.randint(0, 256, (number, rows, columns // 32, 16), dtype=torch.uint8)
                scales = torch.randint(117, 121, (number, rows, columns // 32), dtype=torch.uint8)
                yield f"{index:05}", {f"{name}_blocks": blocks, f"{name}_scales": scales}
            else:
                yield (
                    f"{index:05}",
                    {name: torch.ones_like(meta, device="cpu") if "norm" in name else noise(meta.shape)},
                )

    return config, shards(), "mxfp4"


def block(format: str, experts: int, heads: int) -> tuple[Any, Iterator[tuple[str, dict[str, Tensor]]], str]:
    """The same for one block. In INT4 only the experts are packed."""
    routed = {"n_routed_experts": experts, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
    sizes = {"hidden_size": 7168, "moe_intermediate_size": 2048, "num_hidden_layers": 1, "vocab_size": 1024}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": heads, "first_k_dense_replace": 0}
    config = DeepseekV3Config(**routed, **sizes, **heads_of, n_shared_experts=1)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)

    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for index, (name, meta) in enumerate(model.state_dict().items()):
            found: dict[str, Tensor] = {}
            path, _, leaf = name.rpartition(".")
            if meta.dim() == 3:
                for number in range(experts):
                    halves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
                    for own, weight in zip(halves, noise(tuple(meta.shape[1:])).chunk(len(halves)), strict=True):
                        found |= packed(format, f"{path}.{number}.{own}", weight)
            elif leaf == "weight" and path.rpartition(".")[2].endswith(("_proj", "_with_mqa")):
                found = packed("bf16" if format == "int4" else format, path, noise(tuple(meta.shape)))
            else:
                plain = torch.ones if "norm" in name else torch.zeros
                found[name] = noise(tuple(meta.shape)) if meta.dim() > 1 else plain(meta.shape, dtype=meta.dtype)
            yield f"{index:05}", found

    return config, shards(), {"fp8": "fp8", "int4": "compressed-tensors"}.get(format, "")


def packed(format: str, layer: str, weight: Tensor) -> dict[str, Tensor]:
    """DeepSeek's FP8 with one scale for all tiles, compressed-tensors' INT4 in groups of 32, or the weight."""
    rows, columns = weight.shape
    if format == "fp8":
        scale = weight.abs().max().float() / 448
        tiles = scale.expand(-(-rows // 128), -(-columns // 128)).contiguous()
        codes = (weight.float() / scale).to(torch.float8_e4m3fn)
        return {f"{layer}.weight": codes, f"{layer}.weight_scale_inv": tiles}
    if format == "int4":
        found = ops.quantize(weight, "int4", blocksize=32)
        scales = found.absmax.view(rows, -1)
        shape = torch.tensor([rows, columns])
        parts = {"packed": found.codes.view(torch.int32).view(rows, -1), "scale": scales, "shape": shape}
        return {f"{layer}.weight_{name}": part for name, part in parts.items()}
    return {f"{layer}.weight": weight.clone()}


def make(shape: str, folder: Path, layers: int) -> float:
    """Writes the checkpoint. Returns its size in GB."""
    name, _, format = shape.partition(" ")
    if name == "gpt-oss-20b":
        config, shards, method = gpt_oss(layers)
    else:
        config, shards, method = block(format, *((24, 128) if name == "deepseek-v3" else (72, 64)))
    folder.mkdir()
    where, total = {}, 0
    for number, tensors in shards:
        file = f"model-{number}.safetensors"
        save_file(tensors, folder / file)
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    kind = "GptOssForCausalLM" if name == "gpt-oss-20b" else "DeepseekV3ForCausalLM"
    fields = config.to_dict() | {"architectures": [kind], "dtype": "bfloat16"}
    quantised = {"quantization_config": {"quant_method": method}} if method else {}
    (folder / "config.json").write_text(json.dumps(fields | quantised))
    return total / 1e9


def main() -> None:
    options = arguments()
    rows = []
    for shape in options.shapes:
        folder = options.work / shape.replace(" ", "-")
        try:
            size = make(shape, folder, options.layers)
            for init in ("lora", "pissa") if shape == "gpt-oss-20b" else ("lora",):
                steps = ("--steps", options.steps, "--init", init)
                usage = run_module("bench.checkpoints.step", folder, *steps)
                seconds = {name: usage.report[name] for name in ("load", "steps", "losses")}
                memory = {"private_gb": usage.private / 1e9, "together_gb": usage.together / 1e9}
                rows.append({"shape": shape, "init": init, "gb": size, **seconds, **memory})
                print(rows[-1], flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        write(options.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
