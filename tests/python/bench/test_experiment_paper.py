"""paper-nlg, paper-nlg-rates, paper-nlu: quick runs, interrupted trainings, what is refused, what the page says."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers import QUIET

ROOT = Path(__file__).parents[3]
SUPPORT = ROOT / "tests" / "python" / "support"
NAMES = ("paper-nlg", "paper-nlg-rates", "paper-nlu")

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in QUIET),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def run(*command: str, **environment: str) -> None:
    """Runs Python, and shows what it has said if it fails."""
    path = os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    threads = {"OMP_NUM_THREADS": "1"}  # the cells are forks
    environment = {**os.environ, **threads, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Judge(BaseHTTPRequestHandler):
    """Rates a first turn 6, and a second one 9."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        rating = "[[9]]" if "another" in asked else "[[6]]"
        body = json.dumps({"choices": [{"message": {"content": f"Rating: {rating}"}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all three."""
    folder = tmp_path_factory.mktemp("results")
    with HTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = ["--quick", "--jobs", "2", "--allow-code-execution", "--results", str(folder), "--page", str(folder)]
        url = f"http://127.0.0.1:{server.server_port}/v1"
        run("-m", "bench.experiments", *NAMES, *options, MT_BENCH_JUDGE_URL=url, MT_BENCH_JUDGE_MODEL="judy")
        server.shutdown()
    return folder


def rows(section: str, title: str) -> dict[str, list[str]]:
    """The cells of the rows below a title, by method."""
    lines = section.partition(f"**{title}**")[2].split("\n\n")[1].splitlines()
    return {cells[0]: cells[1:] for line in lines[2:] for cells in [line.strip("| ").split(" | ")]}


def test_quick_runs_measure_all_that_is_wanted(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.experiments.experiment import Options
    from bench.experiments.registry import EXPERIMENTS
    from bench.experiments.results import Results

    monkeypatch.setenv("MT_BENCH_JUDGE_URL", "http://127.0.0.1")
    monkeypatch.setenv("MT_BENCH_JUDGE_MODEL", "judy")
    known = Results(quick)
    options = Options(quick=True, allow_code_execution=True, trained=quick / "trained")
    wanted = {name: EXPERIMENTS[name].wanted(known, options) for name in NAMES}
    assert {name: len(cells) for name, cells in wanted.items()} == {
        "paper-nlg": 5 + 3 * 2 + 2 + 2,  # trainings; tests of mathematics, of programs, of conversation
        "paper-nlg-rates": 3 + 2,
        "paper-nlu": 4 + 3,
    }
    assert all(cell in known for cells in wanted.values() for cell in cells)
    (answers,) = quick.glob("trained/paper_nlg/tiny/*/mt-bench/requests.jsonl")
    assert len(answers.read_text().splitlines()) == 2 * 2
    assert not list(quick.glob("trained/*/tiny/*/checkpoints"))

    def tasks(options: Options) -> set[str]:
        return {getattr(cell, "task", "") for cell in EXPERIMENTS["paper-nlg"].wanted(known, options)}

    assert tasks(options) - tasks(replace(options, allow_code_execution=False)) == {"human-eval", "mbpp"}


def test_the_page_shows_what_was_measured(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores as they stand in the files of results, in percent, each in its column."""
    from bench.experiments.experiment import Options
    from bench.experiments.registry import EXPERIMENTS
    from bench.experiments.results import Results

    monkeypatch.setenv("MT_BENCH_JUDGE_MODEL", "judy")
    known, options = Results(quick), Options(quick=True)
    for line, (task, key, score) in enumerate(
        [("gsm8k", "strict-match", 0.5), ("gsm8k", "flexible-extract", 1.0), ("math", "math_verify", 0.25)]
    ):
        put(known, "paper_nlg_scores", key, score + line / 100, training__method="lora", task=task)
    put(known, "paper_nlg_scores", "pass@1", 0.75, task="human-eval")
    put(known, "paper_nlg_scores", "pass@1", 0.8, task="mbpp")
    shown = rows(EXPERIMENTS["paper-nlg"].section(known, options).text, "tiny")
    missing = "—"
    assert shown["LoRA"] == ["50.00", "101.00", missing, "27.00", *[missing] * 7]
    assert shown["PiSSA"] == [*[missing] * 5, "75.00", missing, "80.00", missing, "7.50", missing]
    assert shown.keys() == {"full", "LoRA", "PiSSA", "QPiSSA, T = 5"}
    rates = EXPERIMENTS["paper-nlg-rates"].section(known, options).text
    assert rows(rates, "tiny")["LoRA"][0] in ("50.00", "0.00")  # at the paper's rate, or another

    put(known, "paper_nlu", "scores", {"dev": {"accuracy": [0.5, 0.75, 0.25]}}, method="pissa", task="rte")
    matched = {"dev_matched": {"accuracy": [0.1, 0.2]}, "dev_mismatched": {"accuracy": [0.9, 0.9]}}
    put(known, "paper_nlu", "scores", matched, task="mnli")
    put(known, "paper_nlu", "scores", {"dev": {"pearson": [None, -0.5], "spearman": [1, 1]}}, task="stsb")
    shown = rows(EXPERIMENTS["paper-nlu"].section(known, options).text, "tiny")
    assert shown["PiSSA"][0] == "20.00 (20.00)"
    assert shown["PiSSA"][6] == "75.00 (25.00)"
    assert shown["PiSSA"][7:] == ["0.00 (-50.00)", missing]
    assert "(" in shown["AdaLoRA"][6]


def put(known: Any, kind: str, key: str, value: Any, training__method: str | None = None, **fields: str) -> None:
    """Changes a score of the known cells with these fields."""
    for record in known._records[kind].values():
        cell = record["cell"]
        if training__method not in (None, cell.get("training", {}).get("method")):
            continue
        if all(cell[name] == wanted for name, wanted in fields.items()):
            record["result"][key] = value


def test_trained_parameters_are_adapters_and_heads(quick: Path) -> None:
    """Two layers of queries, keys and values, 32 x 32, at rank 8; the pooler, 32 x 32, and the classifier, 2 x 32."""
    lines = (quick / "paper_nlu.jsonl").read_text().splitlines()
    trained = {
        record["cell"]["method"]: record["result"]["trained_parameters"]
        for record in map(json.loads, lines)
        if record["cell"]["task"] == "rte"
    }
    adapters, heads = 2 * 3 * 2 * 8 * 32, 32 * 32 + 32 + 2 * 32 + 2
    assert trained["pissa"] == trained["lora"] == adapters + heads
    assert trained["full"] > 2 * trained["pissa"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    run(str(SUPPORT / "killed_cells.py"), str(folder))
    return folder


@pytest.mark.parametrize("place", ["PiSSA, step 3", "PiSSA, end", "full, step 3", "GLUE, epoch 2"])
def test_a_killed_training_goes_on_to_the_same_end(place: str, killed: Path, tmp_path: Path) -> None:
    from bench.experiments.experiment import Options

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from killed_cells import PLACES
    cell, _, reached = PLACES[place]
    interrupted, whole = Options(quick=True, trained=killed / place), Options(quick=True, trained=tmp_path)
    resumed, uninterrupted = cell.run(interrupted), cell.run(whole)
    assert resumed.pop("resumed_after") == reached
    assert uninterrupted.pop("resumed_after") == 0
    assert resumed == uninterrupted
    for file in cell.folder(whole).glob("*.safetensors"):
        assert file.read_bytes() == (cell.folder(interrupted) / file.name).read_bytes(), file.name


@pytest.mark.parametrize("method", ["full", "lora", "pissa", "qpissa_5"])
def test_what_is_tested_is_what_was_trained(method: str, tmp_path: Path) -> None:
    """Its loss on the held-out rows is the one after training, up to bfloat16's rounding, and not that of the base."""
    from bench.experiments.data import instructions
    from bench.experiments.experiment import Options
    from bench.experiments.paper.given import given
    from bench.experiments.paper.instruction_tuning import InstructionTuning, tokenizer

    options = Options(quick=True, trained=tmp_path)
    training = InstructionTuning("tiny", "metamath", method, rate=2e-2)
    after = training.run(options)["after"]["loss"]
    model, tokens = training.trained(options), tokenizer(options)
    assert {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} == {torch.bfloat16}
    assert not model.training
    held_out = instructions.load("metamath", str(given(options, "language").path("metamath")), cache=tmp_path)[-2:]
    total = count = 0.0
    for prompt, completion in zip(held_out["prompt"], held_out["completion"], strict=True):
        asked, answered = tokens(prompt).input_ids, tokens(f"{completion}</s>").input_ids
        batch = {"input_ids": [asked + answered], "labels": [[-100] * len(asked) + answered]}
        with torch.no_grad():
            loss = model(**{name: torch.tensor(value) for name, value in batch.items()}).loss
        total, count = total + float(loss) * len(answered), count + len(answered)
    assert after < math.log(len(tokens)) - 0.06  # the base knows nothing
    assert total / count == pytest.approx(after, abs=0.02)


def test_a_laptop_is_asked_nothing_and_told_the_paper_s_figures() -> None:
    from bench.experiments.evaluation import glue
    from bench.experiments.evaluation.paper_figures import TABLE_2
    from bench.experiments.experiment import Known, Options
    from bench.experiments.registry import EXPERIMENTS

    for name in NAMES:
        assert EXPERIMENTS[name].wanted(Known(), Options()) == []
        assert f"python -m bench.experiments {name} --full" in EXPERIMENTS[name].section(Known(), Options()).text
    text = EXPERIMENTS["paper-nlg"].section(Known(), Options()).text
    assert text.count("not yet measured") == 3
    for model, title in (("LLaMA-2-7B", "Llama-2-7b-hf"), ("Gemma-7B", "gemma-7b")):
        shown = rows(text, title)["PiSSA"][2::2]
        assert shown == [f"{figure:.2f}" for figure in TABLE_2[model]["PiSSA"].values()]
    text = EXPERIMENTS["paper-nlu"].section(Known(), Options()).text
    assert "**deberta-v3-base**: not yet measured" in text
    assert f"| paper | {' | '.join(f'{figure:.2f}' for figure in glue.PAPER['AdaLoRA'].values())} | 89.46 |" in text


def test_data_that_are_given_say_what_is_run(tmp_path: Path) -> None:
    from bench.experiments.experiment import Known, Options
    from bench.experiments.paper.instruction_tuning import InstructionTuning
    from bench.experiments.registry import EXPERIMENTS

    class Trained(Known):
        """Knows all trainings."""

        def __contains__(self, cell: Any) -> bool:
            return isinstance(cell, InstructionTuning)

    options = Options("org/Llama-2-7b-hf", (("metamath", tmp_path), ("math", tmp_path)), full=True)
    cells = EXPERIMENTS["paper-nlg"].wanted(Trained(), options)
    assert [getattr(cell, "task", "") for cell in cells] == ["", "math"] * (7 * 3)
    assert cells[0] == InstructionTuning("Llama-2-7b-hf", "metamath", "full", 2e-5, 0)
    assert {cell.seed for cell in cells[:14:2]} == {0}
    only_code = replace(options, data=(("codefeedback", tmp_path),))
    assert len(EXPERIMENTS["paper-nlg"].wanted(Trained(), only_code)) == 7 * 3
    allowed = EXPERIMENTS["paper-nlg"].wanted(Trained(), replace(only_code, allow_code_execution=True))
    assert {getattr(cell, "task", "") for cell in allowed} == {"", "human-eval"}
    encoders = EXPERIMENTS["paper-nlu"].wanted(Known(), replace(options, data=(("glue", tmp_path),)))
    assert len(encoders) == len(set(encoders)) == 3 * 8 * 6
    sweeps = EXPERIMENTS["paper-nlg-rates"].wanted(Known(), options)
    assert sweeps[0] == cells[0]
    assert [cell.rate for cell in sweeps[:5]] == pytest.approx([2e-5, 1e-5, 5e-5, 5e-6, 1e-4])


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.experiments.experiment import Known, Options
    from bench.experiments.paper.instruction_scores import InstructionScores
    from bench.experiments.paper.instruction_tuning import InstructionTuning
    from bench.experiments.registry import EXPERIMENTS

    for name in NAMES:
        with pytest.raises(SystemExit, match="needs a model: --model"):
            EXPERIMENTS[name].wanted(Known(), Options(full=True))
    for name in NAMES[:2]:
        with pytest.raises(SystemExit, match="with one or more of metamath=PATH codefeedback=PATH evol-instruct=PATH"):
            EXPERIMENTS[name].wanted(Known(), Options("m", (("gsm8k", tmp_path),), full=True))
    with pytest.raises(SystemExit, match="needs data: --data glue=PATH"):
        EXPERIMENTS["paper-nlu"].wanted(Known(), Options("m", full=True))
    options, training = Options(quick=True, trained=tmp_path), InstructionTuning("tiny", "metamath", "lora")
    with pytest.raises(SystemExit, match="metamath-lora-2e-05-0 is not there, which the training has left"):
        InstructionScores(training, "gsm8k").run(options)
    monkeypatch.setenv("PAPER_BATCH", "none")
    with pytest.raises(SystemExit, match="PAPER_BATCH is 'none'; allowed: a number of 1 or more"):
        training.run(options)


def test_methods_without_rates_in_the_paper_have_lora_s() -> None:
    from bench.experiments.paper.glue_tuning import preset_of
    from bench.experiments.presets import PAPER_NLU

    assert preset_of("pissa", "qnli") == PAPER_NLU["PiSSA"]["qnli"]
    for method in ("lora", "gaussian", "dora", "adalora"):
        assert preset_of(method, "qnli") == PAPER_NLU["LoRA, Kaiming start"]["qnli"]
    assert preset_of("full", "qnli") == replace(PAPER_NLU["LoRA, Kaiming start"]["qnli"], learning_rate=2e-5)
