"""GLUE (Wang et al. 2019): the eight tasks of the paper's table 3, read as they are published, and their metrics."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_COLA = ("source", "label", "mark", "sentence")
"""Columns of CoLA, whose files have no header."""


@dataclass(frozen=True)
class GlueTask:
    """A task: where its data stands, and how an answer is scored."""

    folder: str
    """Of its files in GLUE's own archives."""
    config: str
    """Its name in the data set "nyu-mll/glue" of the Hugging Face hub."""
    texts: tuple[str, ...]
    """Columns of the TSV files that the model reads: a sentence, or two."""
    hub_texts: tuple[str, ...]
    """The same in the hub's data set."""
    label: str
    """Column of the TSV files."""
    labels: tuple[str, ...]
    """As they stand in the files, in the order of the hub's numbers; none for a regression."""
    metric: str
    """The key of `scores` that the paper's table shows."""
    evaluated: tuple[str, ...] = ("dev",)
    """Files with labels that are not trained on, the one that the paper shows first."""

    @property
    def num_labels(self) -> int:
        """Outputs of the model; one for a regression."""
        return len(self.labels) or 1

    @property
    def is_regression(self) -> bool:
        return not self.labels


_ENTAILS = ("entailment", "not_entailment")
_TWO = ("sentence1", "sentence2")

TASKS: dict[str, GlueTask] = {
    "mnli": GlueTask(
        "MNLI",
        "mnli",
        _TWO,
        ("premise", "hypothesis"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        ("dev_matched", "dev_mismatched"),
    ),
    "sst2": GlueTask("SST-2", "sst2", ("sentence",), ("sentence",), "label", ("0", "1"), "accuracy"),
    "mrpc": GlueTask("MRPC", "mrpc", ("#1 String", "#2 String"), _TWO, "Quality", ("0", "1"), "accuracy"),
    "cola": GlueTask("CoLA", "cola", ("sentence",), ("sentence",), "label", ("0", "1"), "matthews"),
    "qnli": GlueTask("QNLI", "qnli", ("question", "sentence"), ("question", "sentence"), "label", _ENTAILS, "accuracy"),
    "qqp": GlueTask(
        "QQP",
        "qqp",
        ("question1", "question2"),
        ("question1", "question2"),
        "is_duplicate",
        ("0", "1"),
        "accuracy",
    ),
    "rte": GlueTask("RTE", "rte", _TWO, _TWO, "label", _ENTAILS, "accuracy"),
    "stsb": GlueTask("STS-B", "stsb", _TWO, _TWO, "score", (), "pearson"),
}
"""In the order of the paper's table.

The metrics: accuracy, Matthews' correlation for CoLA, a correlation for STS-B. The table's rows of full fine-tuning and
adapters are those of AdaLoRA's (Zhang et al. 2023), where MNLI's is the accuracy on the matched half and QQP's the
accuracy, not F1; which correlation STS-B's is, neither says: Pearson's is what LoRA's paper (Hu et al. 2021) shows, and
`scores` has Spearman's beside it.
"""

PAPER: dict[str, dict[str, float]] = {
    method: dict(zip(TASKS, figures, strict=True))
    for method, figures in {
        "full": (89.90, 95.63, 89.46, 69.19, 94.03, 92.40, 83.75, 91.60),
        "BitFit": (89.37, 94.84, 87.75, 66.96, 92.24, 88.41, 78.70, 91.35),
        "HAdapter": (90.13, 95.53, 89.95, 68.64, 94.11, 91.91, 84.48, 91.48),
        "PAdapter": (90.33, 95.61, 89.46, 68.77, 94.29, 92.04, 85.20, 91.54),
        "LoRA, Gaussian start": (90.65, 94.95, 89.95, 69.82, 93.87, 91.99, 85.20, 91.60),
        "LoRA, Kaiming start": (89.96, 95.64, 90.28, 70.69, 93.84, 92.03, 84.84, 91.68),
        "DoRA": (90.29, 95.79, 90.93, 70.85, 94.10, 92.07, 86.04, 91.79),
        "AdaLoRA": (90.76, 96.10, 90.69, 71.45, 94.55, 92.23, 88.09, 91.84),
        "PiSSA": (90.37, 96.22, 91.50, 73.12, 94.43, 92.33, 88.69, 92.00),
    }.items()
}
"""The paper's table 3: DeBERTa-v3-base, in percent."""


def load(task: str, source: str, part: str) -> Dataset:
    """Reads a part of a task, in the order of its file.

    Args:
        task: a name in TASKS.
        source: a folder that holds GLUE's folders ("CoLA", "MNLI", ...) with their TSV files; else the name of a data
            set with the hub's columns, such as "nyu-mll/glue".
        part: "train", or a name in the task's `evaluated`.

    Returns:
        Columns "text", "text_pair" where the task has pairs, and "label": an integer, or a float for STS-B (0 to 5).

    Raises:
        ValueError: an unknown task or part, a file that is missing or has no such columns, a label that is not one.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; allowed: {', '.join(TASKS)}")
    found = TASKS[task]
    parts = ("train", *found.evaluated)
    if part not in parts:
        raise ValueError(f"part is {part!r}; allowed for {task}: {', '.join(parts)}")
    return _from_files(found, Path(source), part) if Path(source).is_dir() else _from_hub(found, source, part)


def _from_files(task: GlueTask, folder: Path, part: str) -> Dataset:
    from datasets import Dataset

    path = folder / task.folder / f"{part}.tsv"
    if not path.is_file():
        raise ValueError(f"there is no {path}; needed: GLUE's folder {task.folder} with {part}.tsv")
    return Dataset.from_list([_example(task, path, line, row) for line, row in _rows(task, path)])


def _rows(task: GlueTask, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows by column, with their line. A quotation mark in these files is a character like others.

    QQP's files have a few lines that lack columns: they are left out, as the hub's data set does.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:  # MRPC's files begin with a byte order mark
        names = _COLA if task.folder == "CoLA" else None
        reader = csv.DictReader(file, names, delimiter="\t", quoting=csv.QUOTE_NONE)
        missing = {*task.texts, task.label} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; found {reader.fieldnames}")
        for row in reader:
            if None not in row.values():
                yield reader.line_num, row
            elif task.folder != "QQP":
                raise ValueError(f"{path}:{reader.line_num} lacks columns; needed: {len(row)}, separated by tabs")


def _example(task: GlueTask, path: Path, line: int, row: dict[str, str]) -> dict[str, str | int | float]:
    texts = dict(zip(("text", "text_pair"), (row[name] for name in task.texts), strict=False))
    label = row[task.label]
    if not task.is_regression:
        if label not in task.labels:
            raise ValueError(f"{path}:{line}: the label is {label!r}; allowed: {', '.join(task.labels)}")
        return {**texts, "label": task.labels.index(label)}
    try:
        return {**texts, "label": float(label)}
    except ValueError:
        raise ValueError(f"{path}:{line}: the score is {label!r}; needed: a number") from None


def _from_hub(task: GlueTask, source: str, part: str) -> Dataset:
    from datasets import load_dataset

    split = part.replace("dev", "validation")
    data = load_dataset(source, task.config, split=split).select_columns([*task.hub_texts, "label"])
    return data.rename_columns(dict(zip(task.hub_texts, ("text", "text_pair"), strict=False)))


def encode(data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """What `load` has read as tokens, cut to `max_length`, with "label": columns for transformers' Trainer."""
    texts = [name for name in ("text", "text_pair") if name in data.column_names]

    def tokens(batch: dict[str, list[str]]) -> Any:
        return tokenizer(*(batch[name] for name in texts), truncation=True, max_length=max_length)

    return data.map(tokens, batched=True, remove_columns=texts)


def scores(task: str, logits: np.ndarray, labels: Sequence[float] | np.ndarray) -> dict[str, float]:
    """What a model's outputs are worth, between -1 and 1; `TASKS[task].metric` is the one of the paper.

    Args:
        task: a name in TASKS.
        logits: [n, num_labels].
        labels: [n], as `load` gives them.

    Returns:
        "accuracy", for CoLA "matthews" too; for STS-B "pearson" and "spearman", which are NaN if all outputs are equal.
    """
    from scipy import stats
    from sklearn import metrics

    if TASKS[task].is_regression:
        outputs = logits[:, 0]
        if np.ptp(outputs) == 0:
            return {"pearson": float("nan"), "spearman": float("nan")}
        pearson, spearman = stats.pearsonr(outputs, labels), stats.spearmanr(outputs, labels)
        return {"pearson": float(pearson.statistic), "spearman": float(spearman.statistic)}
    chosen = logits.argmax(-1)
    found = {"accuracy": float(metrics.accuracy_score(labels, chosen))}
    if TASKS[task].metric == "matthews":
        found["matthews"] = float(metrics.matthews_corrcoef(labels, chosen))
    return found
