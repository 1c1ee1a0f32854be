"""Table 2: what is trained on what, what is tested then, and the paper's scores beside those that are known."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from bench.experiments.evaluation.paper_figures import TABLE_2
from bench.experiments.experiment import Cell, Known, Options
from bench.experiments.methods import METHODS
from bench.experiments.models import HUB
from bench.experiments.paper.given import TINY, model_name
from bench.experiments.paper.instruction_scores import JUDGE_URL, InstructionScores, Judgement, judge_model
from bench.experiments.paper.instruction_tuning import InstructionTuning
from bench.experiments.sweep import spread
from bench.experiments.tables import MISSING, measured, number, table

Trainings = Callable[[str, str, str], Sequence[InstructionTuning]]
"""The seeds of a model, a data set and a method."""

DATA = {"metamath": ("gsm8k", "math"), "codefeedback": ("human-eval", "mbpp"), "evol-instruct": ("mt-bench",)}
"""What is trained on, and the tasks that are tested after it."""
METHOD_NAMES = {
    "full": "full",
    "gaussian": "LoRA, Gaussian start",
    "lora": "LoRA, Kaiming start",
    "pissa": "PiSSA",
    "qlora": "",
    "loftq": "",
    "qpissa_5": "",
}
"""The methods, and what table 2 calls those that it has. In 4 bits the paper has T = 5 for language models."""
_IN_PACKAGES = ("human-eval", "mt-bench")
"""Tasks whose data need not be given."""
_CODE = ("human-eval", "mbpp")
_COLUMNS = (
    ("GSM8K, strict", "gsm8k", "strict-match", 100, ""),
    ("GSM8K, flexible", "gsm8k", "flexible-extract", 100, "GSM8K"),
    ("MATH", "math", "math_verify", 100, "MATH"),
    ("HumanEval", "human-eval", "pass@1", 100, "HumanEval"),
    ("MBPP", "mbpp", "pass@1", 100, "MBPP"),
    ("MT-Bench", "mt-bench", "score", 1, "MT-Bench"),
)
"""Title, task, the key of its score, what to multiply that with, the column of table 2 if it stands beside it."""

COMMAND = (
    "python -m bench.experiments {} --full --model meta-llama/Llama-2-7b-hf --data metamath=FILE gsm8k=DIR math=DIR "
    "codefeedback=FILE mbpp=FILE evol-instruct=FILE --jobs 1 --allow-code-execution"
)
NOTES = (
    "Scores in percent, MT-Bench's of 10; mean ± deviation of the seeds, beside the paper's. HumanEval and MBPP run "
    "what a model has written, so they are missing without `--allow-code-execution`. MT-Bench's scores are missing "
    f"without a judge, an endpoint that `{JUDGE_URL}` names; the requests to it lie beside what was trained."
)


def data_sets(options: Options) -> list[str]:
    """What is trained on, as far as it was given.

    Raises:
        SystemExit: nothing was.
    """
    found = [name for name in DATA if name in dict(options.data)]
    if not found:
        paths = " ".join(f"{name}=PATH" for name in DATA)
        raise SystemExit(f"needs data to train on: --data with one or more of {paths}; PROTOCOL.md says what they are")
    return found


def tests(training: InstructionTuning, known: Known, options: Options) -> Iterator[Cell]:
    """What tests a training, once it is there: tasks whose data were given, programs if they may be run, a judge if
    there is one."""
    if training not in known:
        return
    for task in DATA[training.data]:
        is_there = options.quick or task in _IN_PACKAGES or task in dict(options.data)
        if is_there and (options.allow_code_execution or task not in _CODE):
            yield InstructionScores(training, task)
    if InstructionScores(training, "mt-bench") in known and os.environ.get(JUDGE_URL):
        yield Judgement(training, judge_model())


def models(options: Options) -> list[str]:
    """Those that have a name in the paper, and the given one."""
    given = [model_name(options)] if options.model or options.quick else []
    return list(dict.fromkeys([*map(_folder, HUB), *given]))


def comparison(model: str, trainings: Trainings, known: Known) -> str:
    """A table with a row for each method that the paper has or of which something is known; nothing without rows."""
    paper = next((figures for name, figures in TABLE_2.items() if _folder(name) == model), {})
    is_measured, rows = False, []
    for method, name in METHOD_NAMES.items():
        cells = []
        for _, task, key, times, column in _COLUMNS:
            values = [times * value for value in _values(model, method, task, key, trainings, known)]
            is_measured |= bool(values)
            cells.append(measured(spread(values) if values else None, 2))
            cells += [number(paper.get(name, {}).get(column), 2)] if column else []
        if set(cells) != {MISSING}:
            rows.append([METHODS[method].label, *cells])
    state = "random weights, two problems of each task" if model == TINY else "" if is_measured else "not yet measured"
    head = [text for title, *_, column in _COLUMNS for text in ((title, "paper") if column else (title,))]
    return f"**{model}**{state and ': '}{state}\n\n{table(['', *head], rows)}" if rows else ""


def _folder(paper_name: str) -> str:
    return HUB[paper_name].rpartition("/")[2]


def _values(model: str, method: str, task: str, key: str, trainings: Trainings, known: Known) -> list[float]:
    """The scores of all seeds that are known."""
    (data,) = (data for data, tasks in DATA.items() if task in tasks)
    cells: list[Cell] = [
        Judgement(training, judge_model()) if task == "mt-bench" else InstructionScores(training, task)
        for training in trainings(model, data, method)
    ]
    return [known[cell][key] for cell in cells if cell in known]
