"""Known cells run again, on another machine or with other packages: how far their losses are from the first ones."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median

from bench.experiments.encoder import EncoderCell
from bench.experiments.experiment import Known, Options
from bench.experiments.language import LanguageCell
from bench.experiments.methods import METHODS
from bench.experiments.registry import EXPERIMENTS
from bench.experiments.results import Results
from bench.experiments.run import run
from bench.experiments.sweep import loss_of

FIRST = "2.13"
"""The torch version of the first runs."""


def drawn(known: Known) -> list[LanguageCell | EncoderCell]:
    """8 cells of SmolLM2 and 12 of MiniLM, always the same ones: on dense bases, 40 to 50 steps long."""
    wanted = {cell for one in EXPERIMENTS.values() for cell in one.wanted(known, Options()) if cell in known}
    cells = sorted((cell for cell in wanted if isinstance(cell, LanguageCell | EncoderCell)), key=lambda cell: cell.key)
    first = [cell for cell in cells if known.record(cell)["machine"]["torch"].startswith(FIRST)]
    dense = [cell for cell in first if METHODS[cell.method].dense]
    draw = random.Random(0)
    smollm2 = [cell for cell in dense if isinstance(cell, LanguageCell) and cell.task == "gsm8k"]
    return draw.sample(smollm2, 8) + draw.sample([cell for cell in dense if isinstance(cell, EncoderCell)], 12)


def compare(known: Known, folder: Path, options: Options, jobs: int) -> int:
    """Runs what is drawn and not yet in the folder, and prints how far each loss is from the first one. Returns the
    exit code."""
    again, cells = Results(folder), drawn(known)
    failed = run(lambda: [*cells], again, options, jobs)
    apart = []
    for cell in filter(again.__contains__, cells):
        first, second = loss_of(known[cell]), loss_of(again[cell])
        apart.append(100 * abs(second / first - 1))
        print(f"{apart[-1]:6.2f}%  {first:.4f} {second:.4f}  {cell}")
    print(f"{len(apart)} cells; apart by {median(apart):.2f}% (median), {max(apart):.2f}% (most)")
    return 1 if failed else 0
