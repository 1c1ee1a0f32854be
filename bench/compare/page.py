"""The tables of README.md, of bench/speed.md and of the book's pages, from the committed results.

    python -m bench.compare.page    # writes them; a test fails if they differ from the results

A table is written between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy

from bench.compare.models import EXAMPLES, MODELS, TOKENS
from pissa.ops.formats import READ

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PAGES = (
    ROOT / "README.md",
    ROOT / "bench" / "speed.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("evidence", "speed", "what-fits", "gguf", "released-models")),
)

GGUF_TOKENS = (1, 16, 128, 512)

_GB = 1e9
_PARTS = "memory, GB: private, with the file's pages"
_TABLE = re.compile(r"(?<=<!-- table: )(\w+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)

# Rows of bench.checkpoints, and what the page calls their models.
RATES = {
    "step-smollm2": ("SmolLM2-135M", "nf4"),
    "step-smollm2-bf16": ("SmolLM2-135M", "bfloat16"),
    "step-350m": ("0.34 G, Llama's shapes", "nf4"),
    "step-1b": ("Llama-3.2-1B's shapes", "nf4"),
    "step-1b-bf16": ("Llama-3.2-1B's shapes", "bfloat16"),
    "step-3b": ("Llama-3.2-3B's shapes", "nf4"),
    "step-7b": ("Llama-2-7B's shapes", "nf4"),
}
# The results with the current code, on an Intel processor.
COMPARED, STEPS, RELEASED = (f"xeon_2_cores{name}.json" for name in ("", "_checkpoints", "_released"))


def _load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def rows() -> list[dict[str, Any]]:
    """The rows of bench.compare, on Zen 4."""
    return [row for name in ("zen4_2_cores_models.json", "zen4_2_cores.json") for row in _load(name)["rows"]]


def _table(header: str, lines: Iterable[Iterable[str]]) -> str:
    columns = header.split(" | ")
    body = [" | ".join(line) for line in lines]
    return "\n".join(f"| {line} |" for line in (header, " | ".join("---" for _ in columns), *body)).replace("  |", " |")


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{round(value):,}" if value >= 100 else f"{value:.3g}"


# ---- Tables ----------------------------------------------------------------------------------------------------------


def training() -> str:
    """Models of 0.1 to 20 G parameters: tokens per second and memory of a training step, on both processors."""
    zen4, xeon = _load("checkpoints.json"), _load(STEPS)
    lines = []
    for name, (model, format) in RATES.items():
        on_both = [found[name]["result"] for found in (zen4, xeon)]
        memory = _memory(*(max(result[part] for result in on_both) / _GB for part in ("private", "together")))
        lines.append([model, format, *(_number(result["tokens_per_second"]) for result in on_both), memory])
    large = [_largest(name) for name in ("released_models.json", RELEASED)]
    memory = _memory(*(max(row[part] for row in large) for part in ("private_gb", "together_gb")))
    lines.append(["gpt-oss-20b's shapes", "mxfp4", *map(_tokens, large), memory])
    return _table(f"model | format | tokens per second: Zen 4 | Xeon | {_PARTS}", lines)


def beside() -> str:
    """Whole models beside PEFT in the setting in which it is nearest, on both processors."""
    machines = rows(), _load(COMPARED)["rows"]
    works = [row["work"] for row in machines[0] if row["work"].startswith(("training step", "a decoded token"))]
    lines = []
    for work in dict.fromkeys(works):
        line = [work]
        for measured in machines:
            nearest = min((row for row in measured if row["work"] == work), key=_ratio, default=None)
            line.append("" if nearest is None else _shown(nearest))
        lines.append(line)
    return _table("work | Zen 4: PEFT's time / ours (quartiles), ours in ms | Xeon", lines)


def _ratio(row: dict[str, Any]) -> float:
    return float(row["ratio_median"])


def _shown(row: dict[str, Any]) -> str:
    low, high = row["ratio_quartiles"]
    return f"{row['ratio_median']:.2f} ({low:.2f} to {high:.2f}), {_number(row['ours_median_ms'])}"


def xeon_rates() -> str:
    return _rates(STEPS, RELEASED)


def zen4_rates() -> str:
    return _rates("checkpoints.json", "released_models.json")


def _rates(steps: str, released: str) -> str:
    found = _load(steps)
    lines = [_rate(model, format, found[name]["result"]) for name, (model, format) in RATES.items()]
    large = _largest(released)
    lines.append(
        ["gpt-oss-20b's shapes", "mxfp4", _tokens(large), "", _memory(large["private_gb"], large["together_gb"]), ""]
    )
    return _table(
        f"model | format | tokens per second | tokens per second x parameters, G | {_PARTS} | of torch's dense rate",
        lines,
    )


def _rate(model: str, format: str, result: dict[str, Any]) -> list[str]:
    rate = result["tokens_per_second"]
    memory = _memory(result["private"] / _GB, result["together"] / _GB)
    growth = f"{rate * result['parameters'] / 1e9:.0f}"
    return [model, format, _number(rate), growth, memory, f"{result['share_of_dense_rate']:.2f}"]


def models() -> str:
    """Minutes and memory of 500 examples, for models to choose from. A model's rate times its parameters lies between
    those of the two measured models next to it in size."""
    found = [_load(STEPS)[name]["result"] for name, (_, format) in RATES.items() if format == "nf4"]
    known = [(row["parameters"], row["tokens_per_second"] * row["parameters"]) for row in found]
    sizes, growths = ([math.log(size) for size, _ in known], [growth for _, growth in known])
    lines = []
    for model in MODELS:
        growth = float(numpy.interp(math.log(model.parameters), sizes, growths))
        minutes = EXAMPLES * TOKENS * model.parameters / growth / 60
        memory = [f"{model.memory(quant) / _GB:.1f}" for quant in (None, "nf4")]
        name = f"[{model.name.partition('/')[2]}](https://huggingface.co/{model.name})"
        lines.append([name, model.licence, *map(_duration, (minutes, minutes / 4)), *memory])
    return _table("model | licence | two cores | eight cores | memory, GB | in nf4, GB", lines)


# Rows of bench.checkpoints that run the command, and what the page calls them.
COMMANDS = {
    "finetune-smollm2-bf16": "SmolLM2-135M",
    "finetune-smollm2-nf4-alone": "SmolLM2-135M, `--quant nf4` alone",
    "finetune-smollm2": "SmolLM2-135M, in nf4",
    "finetune-1b": "Llama-3.2-1B's size, in nf4",
    "finetune-7b": "Llama-2-7B's size, in nf4",
}


def finetune() -> str:
    """The memory of `pissa finetune`: while it opens the model, while it trains, and as it plans it."""
    found, lines = _load("finetune.json"), []
    for name, model in COMMANDS.items():
        result = found[name]["result"] if name in found else None
        if result is None:
            lines.append([model, *["not measured"] * 4])
            continue
        phases = [_memory(*(result[phase][part] / _GB for part in ("private", "together"))) for phase in _PHASES]
        step = f"{result['batch']} x {result['tokens']}"
        lines.append([model, step, *phases, f"{result['planned'] / _GB:.1f}"])
    columns = "model | tokens in a step | until it is loaded, GB: private, with files | then | as planned"
    return _table(columns, lines)


_PHASES = ("loading", "training")


def _duration(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _largest(released: str = "released_models.json") -> dict[str, Any]:
    """The row of gpt-oss-20b, trained from PiSSA's start."""
    found: dict[str, Any] = next(row for row in _load(released)["rows"] if row["init"] == "pissa")
    return found


def _tokens(row: dict[str, Any]) -> str:
    """Those per second in a row of bench.checkpoints.released. Steps have 512, and the first one reads pages."""
    return _number(512 / row["steps"][-1])


def _memory(private: float, together: float) -> str:
    return f"{private:.1f}, {together:.1f}"


def layers() -> str:
    return _compared(_load(COMPARED)["rows"])


def zen4_layers() -> str:
    """All rows except those of other tables, with the rows against PEFT as installed first."""
    return _compared(row for row in rows() if row["setting"] != "avx2" and "int8" not in row["work"])


def avx2() -> str:
    return _compared(row for row in rows() if row["setting"] == "avx2")


def _compared(wanted: Iterable[dict[str, Any]]) -> str:
    return _table(
        "work | against | goal | peer / ours (quartiles) | ours, ms | peer, ms | memory, MiB: ours / peer",
        map(_line, wanted),
    )


def _line(row: dict[str, Any]) -> list[str]:
    ratio, goal = row["ratio_median"], row["goal"]
    shown = f"**{ratio:.2f}**" if goal is not None and ratio >= goal else f"{ratio:.2f}"
    low, high = row["ratio_quartiles"]
    stretch = "" if row["stretch"] is None else f" (stretch {row['stretch']:g})"
    growth = row["growth_mib"]
    setting = {"tuned": ", tuned" if "PEFT" in row["against"] else "", "avx2": ", both with AVX2"}
    return [
        row["work"],
        row["against"] + setting.get(row["setting"], ""),
        "" if goal is None else f"{goal:g}{stretch}",
        f"{shown} ({low:.2f} to {high:.2f})",
        _number(row["ours_median_ms"]),
        _number(row["peer_median_ms"]),
        "" if growth is None else f"{growth[0]:,.0f} / {growth[1]:,.0f}",
    ]


def int8() -> str:
    """NF4 and INT8, timed in turns."""
    lines = [
        [row["work"].replace("int8, ", ""), _number(row["peer_median_ms"]), _number(row["ours_median_ms"])]
        for row in rows()
        if re.search("int8, r = ", row["work"])
    ]
    return _table("work | nf4, ms | int8, ms", lines)


def precisions() -> str:
    """Held-out losses of bench.learn with and without products of integers, of the seeds that both have."""
    losses: dict[tuple[Any, ...], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in (RESULTS / "learn.jsonl").read_text().splitlines():
        cell, loss = (of := json.loads(line))["cell"], of["result"]["loss"]
        model = cell["model"].split("-Instruct")[0]
        base = "NF4" if cell["base"] == "nf4" else "its file's codes"
        start = {"lora": "LoRA", "pissa": "PiSSA"}[cell["method"]]
        what = (model, base, cell["task"], str(cell["steps"]), start, f"{cell['rate']:g}")
        losses[what][cell["precision"]][cell["seed"]] = loss

    def lines() -> Iterator[list[str]]:
        for what, of in losses.items():
            if seeds := sorted(of["float"].keys() & of["int8"].keys()):
                pairs = [(of["float"][seed], of["int8"][seed]) for seed in seeds]
                each = [", ".join(f"{loss:.3f}" for loss in half) for half in zip(*pairs, strict=True)]
                yield [*what, *each, f"{statistics.mean(b - a for a, b in pairs):+.3f}"]

    return _table("model | base | task | steps | start | rate | float | int8 | mean difference", lines())


def readme() -> str:
    """What 500 examples take, of the 4-bit models that were measured, beside PEFT in the setting in which it is
    nearest."""
    measured, steps = _load(COMPARED)["rows"], _load(STEPS)
    lines = []
    for name, (model, format) in RATES.items():
        if format != "nf4" or name == "step-350m":
            continue
        found, work = steps[name]["result"], f"training step of {model}, nf4, r = 16".replace("shapes", "shape")
        nearest = min((row["ratio_median"] for row in measured if row["work"] == work), default=None)
        peer = "not measured" if nearest is None else f"{nearest:.1f} times as long"
        of_size = _for_examples(found["together"] / _GB, found["tokens_per_second"])
        lines.append([f"{model}, nf4".replace("shapes", "size"), *of_size, peer])
    large = _largest(RELEASED)
    of_large = _for_examples(large["together_gb"], 512 / large["steps"][-1])
    lines.append(["gpt-oss-20b's size, MXFP4 as released", *of_large, "not measured: it needs 42 GB"])
    return _table("model | memory | time | PEFT with bitsandbytes", lines)


def demo() -> str:
    """What bench/demo.py has shown and counted."""
    found = _load("demo.json")
    pissa, lora = (found["runs"][method]["held_out"] for method in ("PiSSA", "LoRA"))
    training, chat = ("\n".join(found[name]) for name in ("PiSSA", "chat"))
    [(minutes, seconds)] = re.findall(r"training: .*\[(\d+):(\d+)<00:00", training)
    [memory] = re.findall(r"peak memory (\S+ GB)", training)
    before, after = (answer.split("\n")[0].split(". ")[0] for answer in re.split(r"--- \w+\n", chat)[1:])
    right = found["right"]
    return _table(
        f"  | before | PiSSA, {round(int(minutes) + int(seconds) / 60)} minutes, {memory} | LoRA at PiSSA's rate, 2e-4",
        [
            [
                f"reviews sorted correctly, of {found['of']} others",
                *(str(right[of]) for of in ("before", "PiSSA", "LoRA")),
            ],
            ["held-out loss", *(f"{loss:.2f}" for loss in (pissa[0][1], pissa[-1][1], lora[-1][1]))],
            ["the answer to the first of these reviews", before, after, ""],
        ],
    )


def _for_examples(memory: float, tokens_per_second: float) -> tuple[str, str]:
    """Memory, and the time on two cores."""
    return f"{memory:.1f} GB", _duration(EXAMPLES * TOKENS / tokens_per_second / 60)


def gguf_types() -> str:
    """Each type's time beside nf4's, by rows of x, forward and with the backward pass."""
    found = {row["work"]: row for row in _load("gguf_rows.json")["rows"]}
    lines = []
    for format in (name for name in READ if f"forward, {name}, r = 64, M = 1" in found):
        line = [format.removesuffix("_gguf").upper()]
        for work in ("forward", "forward + backward"):
            times = (found[f"{work}, {format}, r = 64, M = {tokens}"]["ratio_median"] for tokens in GGUF_TOKENS)
            line.append(", ".join(f"{1 / ratio:.2f}" for ratio in times))
        lines.append(line)
    tokens = ", ".join(map(str, GGUF_TOKENS))
    return _table(f"type | forward at {tokens} tokens | with the backward pass", lines)


def gguf_training() -> str:
    """Trainings on real files, beside the dequantised model. A rate is None if other programs ran beside it."""
    lines = []
    for row in _load("gguf_models.json")["rows"]:
        lines.append(
            [
                f"{row['file'].removesuffix('.gguf')}, {row['init']}, {row['steps']} steps of {row['batch']}",
                row["base"],
                f"{row['before']:.3f} → {row['after']:.3f}",
                "" if row["tokens_per_second"] is None else _number(row["tokens_per_second"]),
                f"{row['private_gb']:.1f}, {row['mapped_gb']:.1f}",
            ]
        )
    return _table("model | base | held-out loss | tokens per second | memory, GB: private, mapped", lines)


def merges() -> str:
    """What is left of a training after merges into the codes of its base."""
    lines = []
    for row in _load("merge_share.json")["rows"]:
        ways = "nearest", "dither", "feedback, dither", "through"
        kept = [f"{max(row[f'kept, {way}'], 0):.0%}" if f"kept, {way}" in row else "" for way in ways]
        of = row["of"].removesuffix(".gguf") + (f", seed {row['seed']}" if row["seed"] else "")
        lines.append([of, str(row["steps"]), f"{row['base']:.3f} → {row['adapter']:.3f}", *kept])
    kept = "kept: nearest | at random | with feedback | trained through it"
    return _table(f"base | steps | held-out loss, adapter beside it | {kept}", lines)


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        *(
            training,
            beside,
            models,
            finetune,
            xeon_rates,
            layers,
            zen4_rates,
            zen4_layers,
            avx2,
            int8,
            precisions,
            readme,
            demo,
            gguf_types,
            gguf_training,
        ),
        merges,
    )
}


def written(text: str) -> str:
    """The page with its tables regenerated."""
    return _TABLE.sub(lambda match: f"{match[1]}{match[2]}{TABLES[match[1]]()}\n", text)


def main() -> None:
    for page in PAGES:
        page.write_text(written(page.read_text()))


if __name__ == "__main__":
    main()
