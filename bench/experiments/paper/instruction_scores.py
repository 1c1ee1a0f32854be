"""The cells that test what `InstructionTuning` has trained: mathematics, programs, conversations."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from bench.experiments.evaluation import human_eval, lm_harness, mbpp, mt_bench, programs
from bench.experiments.evaluation.answers import alpaca_prompt, answers
from bench.experiments.experiment import Cell, Options, Result
from bench.experiments.paper.given import from_environment, given
from bench.experiments.paper.instruction_tuning import InstructionTuning, tokenizer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

BATCH = "PAPER_TEST_BATCH"
"""The environment variable that says how many answers are written at once; 32 if it is not set."""
JUDGE_URL, JUDGE_MODEL = "MT_BENCH_JUDGE_URL", "MT_BENCH_JUDGE_MODEL"
"""The environment variables of MT-Bench's judge: an endpoint with OpenAI's interface, as https://api.openai.com/v1, and
its model, gpt-4 if that is not set. OPENAI_API_KEY has the key."""


class Model(NamedTuple):
    """A trained model, and how it is asked."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    options: Options
    folder: Path
    """Where the training has left the model, and where answers go."""
    limit: int | None
    """The first so many problems; None for all."""
    new_tokens: int | None
    """Length of an answer; None for the task's own."""
    batch: int

    def mathematics(self, task: str) -> Result:
        path = self.options.path(task)
        return dict(
            lm_harness.evaluate(self.model, self.tokenizer, task, path, self.limit, self.batch, self.new_tokens)
        )

    def programs(self, problems: list[programs.Problem]) -> Result:
        def generate(instructions: list[str]) -> list[str]:
            return self.converse([[{"role": "user", "content": text}] for text in instructions], 512)

        return dict(programs.evaluate(generate, problems[: self.limit], self.options.allow_code_execution))

    def conversations(self) -> Result:
        """Writes the answers, and what a judge is to be asked about them."""
        bench = _bench(self.options, self.limit)
        file = answers_file(self.folder)
        file.parent.mkdir(exist_ok=True)
        mt_bench.write_answers(lambda chats: self.converse(chats, 1024), bench, self.folder.name, file)
        asked = mt_bench.requests(bench, file)
        mt_bench.write_requests(asked, file.with_name("requests.jsonl"))
        return {"requests": len(asked)}

    def converse(self, chats: list[mt_bench.Messages], new_tokens: int) -> list[str]:
        prompts = list(map(alpaca_prompt, chats))
        return answers(self.model, self.tokenizer, prompts, self.batch, self.new_tokens or new_tokens)


TASKS: dict[str, Callable[[Model], Result]] = {
    "gsm8k": lambda model: model.mathematics("gsm8k"),
    "math": lambda model: model.mathematics("math"),
    "human-eval": lambda model: model.programs(human_eval.problems()),
    "mbpp": lambda model: model.programs(mbpp.problems(model.options.path("mbpp"))),
    "mt-bench": lambda model: model.conversations(),
}


@dataclass(frozen=True)
class InstructionScores(Cell):
    """One task, greedily, in bfloat16. Of MT-Bench the answers alone: see `Judgement`."""

    kind: ClassVar[str] = "paper_nlg_scores"
    training: InstructionTuning
    task: str

    def prepare(self, options: Options) -> None:
        given(options, "language")

    def run(self, options: Options) -> Result:
        trained = self.training.trained(options)
        limit, new_tokens = (2, 4) if options.quick else (None, None)
        found = given(options, "language")
        folder, batch = self.training.folder(found), from_environment(BATCH, 32)
        return TASKS[self.task](Model(trained, tokenizer(options), found, folder, limit, new_tokens, batch))


@dataclass(frozen=True)
class Judgement(Cell):
    """What a judge says of the answers that `InstructionScores` has written; its judgements lie beside them."""

    kind: ClassVar[str] = "paper_nlg_judgements"
    training: InstructionTuning
    judge: str

    def prepare(self, options: Options) -> None:
        given(options, "language")

    def run(self, options: Options) -> Result:
        limit = 2 if options.quick else None
        options = given(options, "language")
        folder, bench = self.training.folder(options), _bench(options, limit)
        by, file = mt_bench.Judge(os.environ[JUDGE_URL], self.judge), answers_file(folder).with_name("judgements.jsonl")
        asked = mt_bench.requests(bench, answers_file(folder))
        mt_bench.judge(asked, folder.name, by, file)
        return dict(mt_bench.scores(bench, asked, by, file))


def judge_model() -> str:
    return os.environ.get(JUDGE_MODEL, "gpt-4")


def answers_file(folder: Path) -> Path:
    return folder / "mt-bench" / "answers.jsonl"


def _bench(options: Options, limit: int | None) -> mt_bench.Bench:
    bench = mt_bench.load(dict(options.data).get("mt-bench"))
    return bench._replace(questions=bench.questions[:limit])
