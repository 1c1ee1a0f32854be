"""bench.experiments.evaluation.glue: files as GLUE publishes them, and scores that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_model import tiny_tokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
STSB = "index genre filename year old_index source1 source2 sentence1 sentence2 score"

HEADERS = {
    "mnli": f"{MNLI} sentence1 sentence2 label1 gold_label".split(),
    "sst2": ["sentence", "label"],
    "mrpc": ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    "cola": None,
    "qnli": ["index", "question", "sentence", "label"],
    "qqp": ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
    "rte": ["index", "sentence1", "sentence2", "label"],
    "stsb": STSB.split(),
}
PARSED = ["0", "31193", "31193n", "fiction", "( a b )", "( c d )", "(ROOT a)", "(ROOT c)"]
SOURCES = ["0", "main-news", "headlines", "2012", "0004", "none", "none"]
ROWS = {
    "mnli": [
        [*PARSED, 'He said "no.', 'A "second" half', "neutral", "contradiction"],
        [*PARSED, "naïve — text", "it\u2028is one line", "entailment", "entailment"],
    ],
    "sst2": [['a "quoted film ', "0"], ["it 's fine ", "1"]],
    "mrpc": [["1", "702876", "702977", '"Open', "it's"], ["0", "1", "2", "$ 4.50", "£ 4"]],
    "cola": [["gj04", "1", "", "Our friends \"won't buy."], ["gj04", "0", "*", "The box wide."]],
    "qnli": [["0", 'Who was "x"?', "y", "not_entailment"], ["1", "When?", '5" of rain', "entailment"]],
    "qqp": [["1", "2", "3", 'What "is', "Why?", "1"], ["4", "5", "6", "no more"], ["7", "8", "9", "a", "b", "0"]],
    "rte": [["0", 'The "first', "b", "not_entailment"], ["1", "c", "d", "entailment"]],
    "stsb": [[*SOURCES, 'A "plane', "An air plane", "5.000"], [*SOURCES, "x", "y", "0.250"]],
}
READ: dict[str, list[tuple[str, str | None, float]]] = {
    "mnli": [('He said "no.', 'A "second" half', 2), ("naïve — text", "it\u2028is one line", 0)],
    "sst2": [('a "quoted film ', None, 0), ("it 's fine ", None, 1)],
    "mrpc": [('"Open', "it's", 1), ("$ 4.50", "£ 4", 0)],
    "cola": [("Our friends \"won't buy.", None, 1), ("The box wide.", None, 0)],
    "qnli": [('Who was "x"?', "y", 1), ("When?", '5" of rain', 0)],
    "qqp": [('What "is', "Why?", 1), ("a", "b", 0)],
    "rte": [('The "first', "b", 1), ("c", "d", 0)],
    "stsb": [('A "plane', "An air plane", 5.0), ("x", "y", 0.25)],
}


def write(task: str, folder: Path, part: str) -> Path:
    from bench.experiments.evaluation.glue import TASKS

    path = folder / TASKS[task].folder / f"{part}.tsv"
    path.parent.mkdir(exist_ok=True)
    header = HEADERS[task]
    text = "\n".join("\t".join(row) for row in [*([header] if header else []), *ROWS[task]]) + "\n"
    path.write_text(text, encoding="utf-8-sig" if task == "mrpc" else "utf-8", newline="\n")
    return path


@pytest.mark.parametrize("task", READ)
def test_published_files_are_read(task: str, tmp_path: Path) -> None:
    from bench.experiments.evaluation.glue import PAPER, TASKS, encode, load

    for part in ("train", *TASKS[task].evaluated):
        write(task, tmp_path, part)
        data = load(task, str(tmp_path), part)
        assert [(row["text"], row.get("text_pair"), row["label"]) for row in data] == READ[task]
    assert TASKS[task].num_labels == {"mnli": 3, "stsb": 1}.get(task, 2)
    assert all(0 < figures[task] < 100 for figures in PAPER.values())
    encoded = encode(data, tiny_tokenizer(), max_length=8)
    assert encoded.column_names == ["label", "input_ids", "attention_mask"]
    texts = [text + (pair or "") for text, pair, _ in READ[task]]
    assert list(map(len, encoded["input_ids"])) == [min(8, len(text.encode())) for text in texts]


def test_the_hub_s_columns_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from bench.experiments.evaluation.glue import load

    asked: list[Any] = []

    def load_dataset(*args: str, **named: str) -> datasets.Dataset:
        asked.append((*args, named))
        return datasets.Dataset.from_dict({"premise": ["a"], "hypothesis": ["b"], "label": [2], "idx": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load("mnli", "nyu-mll/glue", "dev_mismatched")
    assert data[:] == {"text": ["a"], "text_pair": ["b"], "label": [2]}
    assert asked == [("nyu-mll/glue", "mnli", {"split": "validation_mismatched"})]


def test_what_is_wrong_in_a_file_is_said(tmp_path: Path) -> None:
    from bench.experiments.evaluation.glue import load

    with pytest.raises(ValueError, match=r"there is no .*RTE.train\.tsv; needed"):
        load("rte", str(tmp_path), "train")
    with pytest.raises(ValueError, match="part is 'dev'; allowed for mnli: train, dev_matched, dev_mismatched"):
        load("mnli", str(tmp_path), "dev")
    path = write("rte", tmp_path, "dev")
    for old, new, said in (
        ("\tlabel", "", "has no column label; found"),
        ("\tnot_entailment", "\tmaybe", r"dev\.tsv:2: the label is 'maybe'; allowed: entailment, not_entailment"),
        ("\tentailment", "", r"dev\.tsv:3 lacks columns; needed: 4"),
    ):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=said):
            load("rte", str(tmp_path), "dev")
        path.write_text(text)


def test_scores() -> None:
    """Formulas by hand. Of five answers one of each class is wrong: accuracy 3/5, and Matthews' correlation
    (1 * 2 - 1 * 1) / sqrt(2 * 2 * 3 * 3) = 1/6."""
    from bench.experiments.evaluation.glue import scores

    logits = np.eye(2)[[1, 0, 0, 0, 1]]
    labels = [1, 1, 0, 0, 0]
    assert scores("cola", logits, labels) == pytest.approx({"accuracy": 3 / 5, "matthews": 1 / 6})
    assert scores("rte", logits, labels) == pytest.approx({"accuracy": 3 / 5})
    assert scores("mnli", np.eye(3)[[0, 2, 1]], [0, 2, 0]) == pytest.approx({"accuracy": 2 / 3})
    # Outputs 0, 1, 3 and scores 1, 0, 2: covariance 2, sums of squares 14/3 and 2; ranks differ by 1, -1, 0.
    found = scores("stsb", np.array([[0.0], [1.0], [3.0]]), [1.0, 0.0, 2.0])
    assert found == pytest.approx({"pearson": 2 / np.sqrt(14 / 3 * 2), "spearman": 1 - 6 * 2 / (3 * 8)})
    assert all(np.isnan(value) for value in scores("stsb", np.ones((3, 1)), [1.0, 0.0, 2.0]).values())


def test_the_paper_s_averages() -> None:
    from bench.experiments.evaluation.glue import PAPER

    averages = (88.25, 86.20, 88.28, 88.41, 88.50, 88.62, 88.98, 89.46, 89.83)  # as it prints them
    assert [sum(figures.values()) / 8 for figures in PAPER.values()] == pytest.approx(averages, abs=0.0051)
