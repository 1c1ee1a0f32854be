"""Table 3 at its own size: DeBERTa-v3-base on eight tasks of GLUE. It wants a GPU, --full, --model, --data glue=DIR."""

from __future__ import annotations

from statistics import mean

from bench.experiments.evaluation import glue
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.methods import METHODS
from bench.experiments.models import HUB
from bench.experiments.paper.given import TINY, model_name
from bench.experiments.paper.glue_tuning import FULL_RATE, GlueTuning
from bench.experiments.sweep import Spread, spread
from bench.experiments.tables import MISSING, measured, number, table

METHOD_NAMES = {
    "full": "full",
    "gaussian": "LoRA, Gaussian start",
    "lora": "LoRA, Kaiming start",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "pissa": "PiSSA",
}
"""The methods, and what table 3 calls them."""
SEEDS = (0, 1, 2)
QUICK = {"rte": ("full", "lora", "adalora", "pissa"), **dict.fromkeys(("mnli", "cola", "stsb"), ("pissa",))}
"""Methods by task; those tasks that are read or scored in a way of their own."""
COMMAND = "python -m bench.experiments paper-nlu --full --model microsoft/deberta-v3-base --data glue=DIR --jobs 1"
_PAPER_S, _ROBERTA = (HUB[name].rpartition("/")[2] for name in ("DeBERTa-v3-base", "RoBERTa-large"))


class PaperNlu(Experiment):
    name = "paper-nlu"
    title = "Table 3 at its own size"
    claim = "table 3: PiSSA is above LoRA on seven of eight tasks, and by 1.21 on average"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        """All methods of a task follow each other, then tasks, then seeds."""
        if not (options.full or options.quick):
            return []
        model = model_name(options)
        if options.quick:
            return [GlueTuning(model, task, method) for task, methods in QUICK.items() for method in methods]
        options.path("glue")
        return [GlueTuning(model, t, method, seed) for seed in SEEDS for t in glue.TASKS for method in METHOD_NAMES]

    def section(self, known: Known, options: Options) -> Section:
        given = [model_name(options)] if options.model or options.quick else []
        names = dict.fromkeys([_PAPER_S, _ROBERTA, *given])
        tables = [found for model in names if (found := _table(model, known))]
        notes = (
            f"Made by `{COMMAND}`. Percent, mean ± deviation of the seeds: the best epoch of each run on the "
            "development set, as LoRA's paper has it; this one does not say which epoch it takes. The last epoch's "
            "mean is in brackets. Rates, epochs and batches are the paper's for PiSSA and LoRA; the other adapters "
            f"have LoRA's, and full fine-tuning them too, at a rate of {FULL_RATE:g}."
        )
        return Section("\n\n".join([*tables, notes]))


def _table(model: str, known: Known) -> str:
    """Ours above the paper's; nothing of another model than the paper's that is not measured."""
    rows, is_measured = [], False
    for method, name in METHOD_NAMES.items():
        best, last = ({t: _scores(model, t, method, known, b) for t in glue.TASKS} for b in (True, False))
        is_measured |= any(best.values())
        means = [found.mean for found in best.values() if found]
        average = number(mean(means) if len(means) == len(glue.TASKS) else None, 2)
        rows.append([METHODS[method].label, *(_cell(best[task], last[task]) for task in glue.TASKS), average])
        if model == _PAPER_S:
            figures = [*glue.PAPER[name].values()]
            rows.append(["paper", *(number(figure, 2) for figure in (*figures, mean(figures)))])
    if not is_measured and model != _PAPER_S:
        return ""
    state = "random weights, a few rows" if model == TINY else "" if is_measured else "not yet measured"
    return f"**{model}**{state and ': '}{state}\n\n" + table(["", *glue.TASKS, "average"], rows)


def _cell(best: Spread | None, last: Spread | None) -> str:
    return MISSING if best is None else f"{measured(best, 2)} ({number(last.mean if last else None, 2)})"


def _scores(model: str, task: str, method: str, known: Known, best: bool) -> Spread | None:
    """The paper's score of each seed, in percent, in the best epoch or the last. An epoch without a score, since all
    outputs were equal, counts as 0."""
    part, metric = glue.TASKS[task].evaluated[0], glue.TASKS[task].metric
    cells = [GlueTuning(model, task, method, seed) for seed in SEEDS]
    runs = [[score or 0.0 for score in known[cell]["scores"][part][metric]] for cell in cells if cell in known]
    return spread([100 * (max(run) if best else run[-1]) for run in runs]) if runs else None
