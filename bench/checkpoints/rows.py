"""The rows of the table: what each one measures, and its goal."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, LlamaConfig

from bench.checkpoints.finetune import IN_NF4, finetune
from bench.checkpoints.generate import DTYPES, SHAPES, generated, tensor_shapes
from bench.checkpoints.processes import Usage, run_module
from bench.checkpoints.step import TOKENS as STEP_TOKENS

GB = 1e9
Result = dict[str, Any]


class Options(NamedTuple):
    """What the rows share."""

    work: Path
    """A folder for checkpoints; what is written there is removed."""
    rank: int = 16
    threads: int = 2
    pairs: int = 3
    shape: str | None = None
    """A smaller model in the place of the row's own, to see whether the row runs."""


class Row(NamedTuple):
    """A row of the table."""

    what: str
    goal: str
    measure: Callable[[Options], Result]
    met: Callable[[Result], bool]
    shown: Callable[[Result], str]


def init(options: Options, source: Path, out: Path, *more: object) -> Usage:
    """Runs `pissa init` in its own process."""
    arguments = ("init", source, out, "--rank", options.rank, *more)
    return run_module("pissa", *arguments, threads=options.threads, cwd=options.work)


# ---- Beside the authors' way -----------------------------------------------------------------------------------------


def beside_peer(options: Options) -> Result:
    """SmolLM2-135M in bf16: ours and the authors' way, in turns, whole processes."""
    with _small_model(options, "bf16") as source:
        pairs: list[dict[str, Result]] = []
        for number in range(options.pairs):
            sides: dict[str, Callable[[Path], Usage]] = {
                "ours": lambda out: init(options, source, out, "--quant", "nf4"),
                "peer": lambda out: run_module(
                    "bench.checkpoints.peer", source, out, "--rank", options.rank, threads=options.threads
                ),
            }
            order = list(sides.items())[:: -1 if number % 2 else 1]
            pair = {}
            for name, side in order:
                out = options.work / name
                pair[name] = side(out).as_dict()
                pair[name]["bytes"] = _bytes(out)
                shutil.rmtree(out)
            pairs.append(pair)
    ratios = [pair["ours"]["seconds"] / pair["peer"]["seconds"] for pair in pairs]
    work = [_without_imports(pair["ours"]) / _without_imports(pair["peer"]) for pair in pairs]
    return {"pairs": pairs, "ratio": median(ratios), "ratio_without_imports": median(work)}


def _without_imports(usage: Result) -> float:
    return float(usage["seconds"] - usage["report"]["imports"])


@contextmanager
def _small_model(options: Options, dtype: str) -> Iterator[Path]:
    """SmolLM2-135M, or a generated checkpoint, in that dtype; removed afterwards."""
    source = options.work / "source"
    if options.shape is None:
        _save_smollm2(source, DTYPES[dtype])
        yield source
        shutil.rmtree(source)
    else:
        with generated(source, options.shape, dtype=dtype):
            yield source


def _save_smollm2(folder: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bench.compare.weights import smollm2

    AutoModelForCausalLM.from_pretrained(smollm2(), dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2()).save_pretrained(folder)


# ---- Of any size -----------------------------------------------------------------------------------------------------


def of_shape(shape: str, memory: str) -> Callable[[Options], Result]:
    """`pissa init` of a generated checkpoint, within that memory: the median of some runs, the most memory of all."""

    def measure(options: Options) -> Result:
        used = options.shape or shape
        with generated(options.work / "source", used) as source:
            _set_cache(source, "warm")
            runs = [_init(options, source, used, memory, options.work / "out") for _ in range(options.pairs)]
        middle = sorted(runs, key=lambda found: found["own_seconds"])[len(runs) // 2]
        return {**middle, "private": max(found["private"] for found in runs)}

    return measure


def _init(options: Options, source: Path, shape: str, memory: str, out: Path) -> Result:
    usage = init(options, source, out, "--quant", "nf4", "--memory", memory, "--json")
    linear, total = parameters(LlamaConfig(**SHAPES[shape]))
    read, written = _bytes(source), _bytes(out)
    shutil.rmtree(out)
    seconds = json.loads(usage.output)["seconds"]
    return {
        **usage.as_dict(),
        "own_seconds": seconds,
        "shape": shape,
        "memory": memory,
        "parameters": total,
        "split_parameters": linear,
        "read": read,
        "written": written,
        "gb_per_second": read / seconds / GB,
        "ns_per_parameter": 1e9 * seconds / total,
        "ns_per_split_parameter": 1e9 * seconds / linear,
    }


def parameters(config: Any) -> tuple[int, int]:
    """The numbers of parameters of the layers that are split, and of the model."""
    sizes = tensor_shapes(config)
    linear = sum(math.prod(size) for name, size in sizes.items() if name.endswith("_proj.weight"))
    return linear, sum(math.prod(size) for size in sizes.values())


def seven_billion(options: Options) -> Result:
    """Llama-2-7B's shapes: a copy of the files and `pissa init`, from a cold and a warm cache each. The result is that
    of the warm cache."""
    shape, out = options.shape or "7b", options.work / "out"
    beside: Result = {}
    with generated(options.work / "source", shape) as source:
        for cache in ("cold", "warm"):
            _set_cache(source, cache)
            beside[f"copy_{cache}"] = _copy(source, options.work / "copy")
        for cache in ("cold", "warm"):
            _set_cache(source, cache)
            beside[cache] = _init(options, source, shape, "2GB", out)
    return {**beside.pop("warm"), **beside}


def step_of(shape: str, quant: str | None = "nf4") -> Callable[[Options], Result]:
    """A step of training over a checkpoint, what `pissa init` makes of it or its bfloat16 files: its memory and time
    alone, then in turns with its products at the dense rate."""

    def measure(options: Options) -> Result:
        with _checkpoint(options, shape) as source:
            config = AutoConfig.from_pretrained(source)
            if quant is None:
                return _steps(options, source, config, "--init", "pissa")
            init(options, source, options.work / "out", "--quant", quant, "--memory", "2GB")
        found = _steps(options, options.work / "out", config)
        shutil.rmtree(options.work / "out")
        return found

    return measure


def finetune_of(shape: str, *arguments: str, tokens: int, batch: int) -> Callable[[Options], Result]:
    """`pissa finetune` on the bfloat16 files: its memory until the model is loaded and from then on, and its plan."""

    def measure(options: Options) -> Result:
        with _checkpoint(options, shape) as source:
            return finetune(source, *arguments, tokens=tokens, batch=batch, threads=options.threads)

    return measure


@contextmanager
def _checkpoint(options: Options, shape: str) -> Iterator[Path]:
    if shape == "smollm2" and options.shape is None:
        with _small_model(options, "bf16") as source:
            yield source
    else:
        with generated(options.work / "source", options.shape or shape) as source:
            yield source


def _steps(options: Options, folder: Path, config: Any, *more: str) -> Result:
    alone = run_module("bench.checkpoints.step", folder, *more, threads=options.threads)
    steps = 3 if config.hidden_size >= 4096 else 5
    timed = run_module("bench.checkpoints.step", folder, *more, "--dense", "--steps", steps, threads=options.threads)
    report = timed.report
    dense = [(before + after) / 2 for before, after in zip(report["products"], report["products"][1:], strict=False)]
    ratios = [product / taken for product, taken in zip(dense, report["steps"], strict=True)]
    return {
        **alone.as_dict(),
        "parameters": parameters(config)[1],
        # The first step reads the pages and makes the optimizer's state.
        "tokens_per_second": STEP_TOKENS / median(report["steps"][1:]),
        "beside_dense": report,
        "share_of_dense_rate": median(ratios[1:]),
    }


def _set_cache(folder: Path, state: str) -> None:
    """Empties the page cache of the files in a folder, or fills it."""
    for path in folder.iterdir():
        if state == "warm":
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass
            continue
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # what is not on the disk stays in the cache
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _copy(source: Path, target: Path) -> Result:
    """Seconds until the copy is made, and until it is on the disk."""
    begun = time.perf_counter()
    shutil.copytree(source, target)
    copied = time.perf_counter() - begun
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    synced = time.perf_counter() - begun
    nbytes = _bytes(target)
    shutil.rmtree(target)
    return {"copied": copied, "on_disk": synced, "bytes": nbytes}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---- The table -------------------------------------------------------------------------------------------------------


def _memory(usage: Result) -> str:
    return f"{usage['private'] / GB:.2f} GB private, {usage['mapped'] / GB:.2f} GB mapped"


def _init_shown(usage: Result) -> str:
    return (
        f"{usage['seconds']:.1f} s, {usage['own_seconds']:.1f} s after imports, {usage['gb_per_second']:.2f} GB/s, "
        f"{usage['ns_per_parameter']:.2f} ns a parameter, {_memory(usage)}"
    )


def _peer_shown(result: Result) -> str:
    ours, theirs = (median(pair[side]["seconds"] for pair in result["pairs"]) for side in ("ours", "peer"))
    ratios = f"{result['ratio']:.3f}; without imports {result['ratio_without_imports']:.3f}"
    return f"{ours:.1f} s against {theirs:.1f} s: {ratios}"


def _seven_shown(result: Result) -> str:
    cold, copies = result["cold"], [result[f"copy_{cache}"] for cache in ("cold", "warm")]
    copied = " and ".join(
        f"{copy['copied']:.1f} s ({copy['on_disk']:.1f} s until it is on the disk)" for copy in copies
    )
    return f"{_init_shown(result)}; from a cold cache {cold['seconds']:.1f} s; a copy {copied}"


def _step_shown(result: Result) -> str:
    seconds = median(result["beside_dense"]["steps"][1:])
    rate = result["beside_dense"]["flops"] / seconds / 1e9
    return (
        f"loaded in {result['report']['load']:.1f} s; {_memory(result)}, together {result['together'] / GB:.2f} GB; "
        f"{seconds:.1f} s, {result['tokens_per_second']:.3g} tokens/s, {rate:.0f} GF/s, "
        f"{result['share_of_dense_rate']:.2f} of the dense rate"
    )


def _finetune_shown(result: Result) -> str:
    loading, training = (
        f"{result[phase]['together'] / GB:.2f} GB, {result[phase]['private'] / GB:.2f} of it private"
        for phase in ("loading", "training")
    )
    return f"until the model is loaded {loading}; then {training}; planned {result['planned'] / GB:.2f} GB"


ROWS = {
    "peer": Row(
        "SmolLM2-135M, nf4, beside transformers + PEFT pissa_niter_4 + bitsandbytes, whole processes",
        "at most 1/5",
        beside_peer,
        lambda result: result["ratio"] <= 0.2,
        _peer_shown,
    ),
    **{
        shape: Row(f"{shape}, nf4, --memory {memory}", goal, of_shape(shape, memory), met, _init_shown)
        for shape, memory, goal, met in (
            ("100m", "1GB", "", lambda result: True),
            ("350m", "1GB", "", lambda result: True),
            ("1b", "1GB", "", lambda result: True),
            ("3b", "1GB", "private at most 1.6 GB", lambda result: result["private"] <= 1.6 * GB),
        )
    },
    "7b": Row(
        "7b, nf4, --memory 2GB",
        "private at most 2.6 GB",
        seven_billion,
        lambda result: max(result["private"], result["cold"]["private"]) <= 2.6 * GB,
        _seven_shown,
    ),
    **{
        f"step-{shape}{'' if quant else '-bf16'}": Row(
            f"a step of 1 x {STEP_TOKENS} tokens over {shape} in {quant or 'bf16'}, gradient checkpointing",
            "",
            step_of(shape, quant),
            lambda _: True,
            _step_shown,
        )
        for shape, quant in (
            *(("smollm2", quant) for quant in ("nf4", None)),
            ("100m", "nf4"),
            ("350m", "nf4"),
            *(("1b", quant) for quant in ("nf4", None)),
            ("3b", "nf4"),
        )
    },
    "step-7b": Row(
        f"a step of 1 x {STEP_TOKENS} tokens over 7b in nf4, gradient checkpointing",
        "at most 5.5 GB together, at least 0.92 of the dense rate",
        step_of("7b"),
        lambda result: result["together"] <= 5.5 * GB and result["share_of_dense_rate"] >= 0.92,
        _step_shown,
    ),
    **{
        f"finetune-{name}": Row(
            f"pissa finetune {' '.join(arguments)} on {shape} in bf16, {batch} x {tokens} tokens".replace("  ", " "),
            "at most 8 GB together",
            finetune_of(shape, *arguments, tokens=tokens, batch=batch),
            lambda result: max(result[phase]["together"] for phase in ("loading", "training")) <= 8 * GB,
            _finetune_shown,
        )
        for name, shape, arguments, batch, tokens in (
            ("smollm2", "smollm2", IN_NF4, 8, 200),
            ("smollm2-nf4-alone", "smollm2", IN_NF4[:2], 8, 200),
            ("smollm2-bf16", "smollm2", (), 8, 200),
            ("1b", "1b", IN_NF4, 8, 200),
            ("7b", "7b", IN_NF4, 1, 512),
        )
    },
}


def growth(results: dict[str, Result]) -> Iterator[str]:
    """Seconds per parameter and memory of each size that was measured, in Markdown."""
    sizes = [(name, results[name]) for name in ("100m", "350m", "1b", "3b", "7b") if name in results]
    if not sizes:
        return
    yield "| size | parameters | s | ns a parameter | ns a split parameter | GB/s | private, GB | mapped, GB |"
    yield "|---" * 8 + "|"
    for name, usage in sizes:
        yield (
            f"| {name} | {usage['parameters'] / 1e6:.0f} M | {usage['own_seconds']:.1f} "
            f"| {usage['ns_per_parameter']:.2f} | {usage['ns_per_split_parameter']:.2f} "
            f"| {usage['gb_per_second']:.2f} | {usage['private'] / GB:.2f} | {usage['mapped'] / GB:.2f} |"
        )
