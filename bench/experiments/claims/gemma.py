"""A second language model: whether what SmolLM2's trainings advise holds for Gemma 3 270M."""

from __future__ import annotations

from dataclasses import replace

from bench.experiments import grid, measures, tables
from bench.experiments.claims.forgetting import forgotten
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.figures import label
from bench.experiments.sweep import Sweep

DENSE = ("lora", "rslora", "pissa", "unit", "full")
FOUR_BIT = ("qlora", "feedback_repair", "lora_on_5", "qpissa_5", "own_codes")
METHODS = {"gsm8k": (*DENSE, *FOUR_BIT), "sums": ("lora", "rslora", "pissa")}


def sweeps(task: str, options: Options) -> dict[str, tuple[Sweep, Sweep]]:
    """Those of Gemma, and of SmolLM2."""
    firsts = {method: grid.second_sweep(task, method) for method in METHODS[task]}
    pairs = {m: (replace(s, cell=replace(s.cell, task=f"gemma_{task}")), s) for m, s in firsts.items()}
    return {method: (grid.sized(one, options), grid.sized(two, options)) for method, (one, two) in pairs.items()}


class Gemma(Experiment):
    name = "gemma"
    title = "A second language model"
    claim = "table 2: PiSSA is above LoRA on five models"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        if options.quick:  # there is one tiny model
            return []
        return [cell for task in METHODS for cell in _wanted(task, known, options)]

    def section(self, known: Known, options: Options) -> Section:
        text = []
        for task in METHODS:
            each = sweeps(task, options)
            losses = {method: measures.over_seeds(gemma, known) for method, (gemma, _) in each.items()}
            if not any(losses.values()):
                text.append(f"On {measures.NAMES[task]}, nothing has been run yet.")
                continue
            firsts = {method: measures.over_seeds(smollm2, known) for method, (_, smollm2) in each.items()}
            exact = task == "sums"
            rows = []
            for method, (gemma, smollm2) in each.items():
                above = list(measures.above_0(gemma, known).values())
                columns = [
                    tables.number(above[0]["before"]["loss"] if above else None),
                    tables.measured(losses[method]),
                ]
                if exact:
                    columns.append(tables.measured(measures.over_seeds(gemma, known, measures.accuracy), 1))
                for of in (losses, firsts):
                    columns.append("" if method == "lora" else tables.difference(of[method], of["lora"]))
                columns.append(tables.measured(measures.mean_of(above, forgotten), 3))
                rates = [tables.rate(sweep.best(known)) for sweep in (gemma, smollm2)]
                rows.append([label(method), *columns, *rates])
            head = ["method", "loss before", "after", *(["accuracy, %"] if exact else [])]
            head += ["less LoRA's", "SmolLM2's less LoRA's", "increase on prose", "rate", "SmolLM2's"]
            text.append(f"Gemma 3 270M on {measures.NAMES[task]}, rank 16: held-out loss before and after training.")
            text += [tables.table(head, rows), measures.verdict(losses)]
        return Section("\n\n".join(text))


def _wanted(task: str, known: Known, options: Options) -> list[Cell]:
    return grid.wanted([gemma for gemma, _ in sweeps(task, options).values()], known, options)
