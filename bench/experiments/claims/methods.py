"""Tables 2 and 5, figure 4: every method at its own best rate."""

from __future__ import annotations

from collections.abc import Mapping

from bench.experiments import figures, grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.figures import label
from bench.experiments.sweep import Sweep

DENSE = ("lora", "rslora", "pissa", "unit", "dora", "olora", "pissa_dora", "adalora", "loraplus", "full")
FOUR_BIT = ("qlora", "loftq", "qpissa_1", "qpissa_5")
TASKS = {"gsm8k": (*DENSE, *FOUR_BIT), "sums": DENSE}
"""The methods that are trained on each."""

_PAPER = (
    """\
The paper's tables 2 (mean ± deviation of 3 runs) and 5, accuracy in %:

"""
    + tables.table(
        ["model, task", "full", "LoRA, Gaussian", "LoRA", "PiSSA"],
        [
            ["LLaMA-2-7B, GSM8K", "49.13 ± 0.21", "42.85 ± 0.12", "43.23 ± 0.64", "53.22 ± 0.55"],
            ["LLaMA-2-7B, MATH", "7.29 ± 0.22", "5.50 ± 0.33", "5.90 ± 0.16", "7.47 ± 0.34"],
            ["Mistral-7B, GSM8K", "69.91 ± 0.25", "69.50 ± 0.42", "69.40 ± 0.25", "73.31 ± 0.23"],
            ["Mistral-7B, MATH", "18.64 ± 0.35", "20.08 ± 0.20", "19.99 ± 0.44", "23.12 ± 0.52"],
            ["Gemma-7B, GSM8K", "72.09 ± 0.32", "75.11 ± 0.64", "74.53 ± 0.47", "77.78 ± 0.32"],
            ["Gemma-7B, MATH", "22.71 ± 0.34", "30.41 ± 0.48", "29.90 ± 0.16", "31.33 ± 0.33"],
        ],
    )
    + "\n\n"
    + tables.table(
        ["LLaMA-3-8B, GSM8K", "plain", "with DoRA", "with AdaLoRA"],
        [["LoRA", "71.01", "72.38", "72.31"], ["PiSSA", "76.75", "77.51", "78.59"]],
    )
)


def sweeps(task: str, options: Options) -> dict[str, Sweep]:
    return {method: grid.sized(grid.language_sweep(task, method), options) for method in TASKS[task]}


class Methods(Experiment):
    name = "methods"
    title = "Every method at its best rate"
    claim = "tables 2, 5 and figure 4: PiSSA is above LoRA, DoRA, AdaLoRA and, mostly, full fine-tuning"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return grid.wanted([sweep for task in TASKS for sweep in sweeps(task, options).values()], known, options)

    def section(self, known: Known, options: Options) -> Section:
        parts = [part for task in TASKS for part in _task(task, sweeps(task, options), known)]
        return Section(
            "\n\n".join([*parts, _PAPER]),
            {"methods-rates.png": _rates(known, options), "methods-best.png": _best(known, options)},
        )


def _task(task: str, each: Mapping[str, Sweep], known: Known) -> list[str]:
    """The table of a task, and what it means."""
    losses = {method: measures.over_seeds(sweep, known) for method, sweep in each.items()}
    columns = [tables.column(losses)]
    parts = [measures.verdict(losses)]
    if task == "sums":
        accuracies = {method: measures.over_seeds(sweep, known, measures.accuracy) for method, sweep in each.items()}
        columns.append(tables.column(accuracies, 1, largest=True))
        parts.append(measures.verdict(accuracies, "accuracy", largest=True))
    head = ["best rate", "loss", *(["accuracy, %"] if len(columns) > 1 else []), "loss less LoRA's", "seeds"]
    head += ["gradient norm, first 10 steps → last 10", "training, s", "peak memory, MiB", "trained parameters"]
    rows = [
        [
            label(method),
            tables.rate(sweep.best(known)),
            *(column[method] for column in columns),
            "" if method == "lora" else tables.difference(losses[method], losses["lora"]),
            tables.count(losses[method]),
            *_costs(sweep, known),
        ]
        for method, sweep in each.items()
    ]
    return [f"**{measures.TASKS[task]}**, rank 16", tables.table(["method", *head], rows), " ".join(parts)]


def _costs(sweep: Sweep, known: Known) -> list[str]:
    """Of seed 0 at the best rate: nothing else is in its time and memory."""
    result = measures.seed_0(sweep, known)
    if result is None:
        return [tables.MISSING] * 4
    first, last = measures.first_and_last(result["gradient_norms"])
    return [
        f"{first:.2g} → {last:.2g}",
        f"{result['seconds']['training']:.0f}",
        f"{result['peak_memory_mib']:,}",
        f"{result['trained_parameters']:,}",
    ]


def _best(known: Known, options: Options) -> figures.Figure:
    titles = ("SmolLM2 on GSM8K: loss", "sums: loss", "sums: accuracy")
    figure, axes = figures.panels(titles, height=2.9)
    gsm8k = {m: measures.over_seeds(s, known) for m, s in sweeps("gsm8k", options).items()}
    # A line for each method of the first panel, for the names are there.
    sums, right = (dict.fromkeys(gsm8k) for _ in range(2))
    for method, sweep in sweeps("sums", options).items():
        sums[method] = measures.over_seeds(sweep, known)
        right[method] = measures.over_seeds(sweep, known, measures.accuracy)
    figures.gaps(axes[0], gsm8k, "lora", "loss")
    figures.gaps(axes[1], sums, "lora", "loss", named=False)
    figures.gaps(axes[2], right, "lora", "points", named=False)
    figures.note(figure, figures.GAP_NOTE)
    return figure


def _rates(known: Known, options: Options) -> figures.Figure:
    parts = [("gsm8k", "dense base", DENSE), ("gsm8k", "base in 4 bits", FOUR_BIT), ("sums", "dense base", DENSE)]
    figure, axes = figures.panels([f"{measures.TASKS[task]}, {base}" for task, base, _ in parts], columns=2)
    for one, (task, _, methods) in zip(axes, parts, strict=True):
        figures.sweeps(
            one, {method: sweep for method, sweep in sweeps(task, options).items() if method in methods}, known
        )
    figures.legend(figure, (*DENSE, *FOUR_BIT), figures.SWEEP_NOTE)
    return figure
