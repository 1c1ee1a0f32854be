"""Where each sweep of the learning rate begins: the middle one of its five rates, fixed before the runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bench.experiments.encoder import EncoderCell
from bench.experiments.experiment import Cell, Known, Options
from bench.experiments.language import LanguageCell
from bench.experiments.methods import RELEASED
from bench.experiments.sweep import SEEDS, Sweep

# At rank 16. PiSSA's is what an earlier sweep on this model found, LoRA's too; the others by what their papers say of
# their rate beside LoRA's (arXiv 2602.04998).
_LANGUAGE = {
    "lora": 2e-3,
    "rslora": 5e-4,
    "pissa": 5e-4,
    "unit": 2e-3,
    "dora": 2e-3,
    "olora": 2e-4,
    "pissa_dora": 5e-4,
    "adalora": 5e-3,
    "loraplus": 5e-4,
    "full": 1e-4,
    "medium": 5e-4,
    "minor": 1e-3,
    "lora_256": 5e-4,
    "pissa_64": 1e-4,
    "pissa_256": 5e-5,
    "qlora": 2e-3,
    "loftq": 1e-3,
    "qpissa_1": 5e-4,
    "qpissa_5": 5e-4,
    "pissa_on_nf4": 5e-4,
    "unit_on_nf4": 2e-3,
    "lora_on_1": 2e-3,
    "lora_on_5": 2e-3,
    "unit_on_1": 2e-3,
    "unit_on_5": 2e-3,
    "repair_1": 2e-3,
    "repair_5": 2e-3,
    "repair_diagonal": 2e-3,
    "feedback": 2e-3,
    "feedback_repair": 2e-3,
    "pissa_on_repair": 5e-4,
    "nf3": 2e-3,
    "nf3_repair": 2e-3,
    "nf3_both": 2e-3,
    "nf2_both": 2e-3,
    **dict.fromkeys(RELEASED, 2e-3),
}
# On GSM8K with SmolLM2, at rank 16.
_BEST = {
    **dict.fromkeys(["lora", "qlora", "feedback_repair", "lora_on_5", "own_codes"], 2e-3),
    **{"rslora": 1e-3, "unit": 1e-3, "pissa": 2e-4, "qpissa_5": 5e-4, "full": 1e-4},
}
_ENCODER = {
    "lora": 5e-3,
    "gaussian": 5e-3,
    "rslora": 2e-3,
    "pissa": 1e-3,
    "unit": 2e-3,
    "dora": 5e-3,
    "olora": 1e-3,
    "adalora": 1e-2,
    "full": 2e-4,
    "medium": 2e-3,
    "minor": 5e-3,
    **dict.fromkeys(["qlora", "lora_on_5", "repair_1", "repair_5", "feedback", "feedback_repair"], 5e-3),
}
# A rate of this grid for each factor of 4 in the rank: small ranks want larger rates.
_TIMES = {1: 2.5, 4: 2.0, 16: 1.0, 64: 0.5, 128: 0.4}


def language_sweep(task: str, method: str, r: int = 16) -> Sweep:
    return Sweep(LanguageCell(task, method, r, _LANGUAGE[method] * _TIMES[r]))


def second_sweep(task: str, method: str) -> Sweep:
    """On a second model: of three rates, around the best one of the first."""
    return Sweep(LanguageCell(task, method, 16, _BEST[method]), points=3)


def encoder_sweep(task: str, method: str, r: int = 16, seeds: tuple[int, ...] = SEEDS) -> Sweep:
    return Sweep(EncoderCell(task, method, r, _ENCODER[method] * _TIMES[r]), seeds=seeds)


def sized(sweep: Sweep, options: Options) -> Sweep:
    """With --quick: one rate of the sweep, and a second seed for LoRA and PiSSA, which every claim has."""
    if not options.quick:
        return sweep
    seeds = sweep.seeds[:1] if sweep.cell.method in ("lora", "pissa") else ()
    return replace(sweep, seeds=seeds, points=1, extends=False)


def wanted(sweeps: Iterable[Sweep], known: Known, options: Options) -> list[Cell]:
    """The cells of all sweeps: the middle ones of each first."""
    each = [sized(sweep, options).wanted(known) for sweep in sweeps]
    longest = max(map(len, each), default=0)
    return [cells[i] for i in range(longest) for cells in each if i < len(cells)]
