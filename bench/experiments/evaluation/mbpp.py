"""MBPP (Austin et al. 2021, arXiv 2108.07732): small Python problems in a sentence, each with three tests.

The prompt shows the tests, as that paper's does: without them a model cannot know the function's name. The problems are
those of the split "test", task_id 11 to 510. The figures of the paper on PiSSA may be of another selection of them.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.experiments.evaluation import programs
from pissa.cli.terminal import UserError

PAPER = {
    "LLaMA-2-7B": {"full": 35.59, "lora gaussian": 35.50, "lora kaiming": 35.47, "pissa": 37.24},
    "Mistral-7B-v0.1": {"full": 51.46, "lora gaussian": 58.46, "lora kaiming": 58.39, "pissa": 62.55},
    "Gemma-7B": {"full": 55.67, "lora gaussian": 65.58, "lora kaiming": 65.25, "pissa": 66.17},
}
"""Percent; table 2 of arXiv 2404.02948v4, trained on 100,000 examples of CodeFeedback, means of three runs."""

TEST = range(11, 511)
INSTRUCTION = "{}\nYour code should pass these tests:\n\n{}\n\nAnswer with one code block."


def problems(path: Path) -> list[programs.Problem]:
    """Reads mbpp.jsonl, or the folder that has it.

    Raises:
        UserError: there is no such file, or it has no problem of the split "test".
    """
    file = path / "mbpp.jsonl" if path.is_dir() else path
    if not file.exists():
        raise UserError(
            f"MBPP is in no package: {file} does not exist; give mbpp.jsonl, or its folder, as published in "
            "google-research/google-research, folder mbpp"
        )
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    tested = [row for row in rows if row["task_id"] in TEST]
    if not tested:
        raise UserError(f"{file} has {len(rows)} problems, none with a task_id of 11 to 510, the split that is tested")
    # What is set up may use what the answer defines.
    return [
        programs.Problem(
            INSTRUCTION.format(row["text"], "\n".join(row["test_list"])),
            "",
            "\n".join([row["test_setup_code"], *row["test_list"], ""]),
        )
        for row in tested
    ]


def evaluate(generate: programs.Generate, path: Path, *, allow_code_execution: bool) -> dict[str, float]:
    """pass@1 of the problems in `path`: see `programs.evaluate`."""
    return programs.evaluate(generate, problems(path), allow_code_execution)
