"""The plan of a training: what it counts and measures, and what it advises."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import pages
import pissa
from pissa.cli import main, plan, training
from pissa.cli.plan import TrainingPlan, make_plan, needs_checkpointing
from pissa.cli.terminal import as_duration
from runs import command, cut_last_step, history, logged, refused

LENGTHS = [2, 9, 4, 4, 6, 1, 3, 8, 5, 7]


class Row(nn.Module):
    """A model that notes the batches that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.device = torch.device("cpu")
        self.batches: list[Tensor] = []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        assert self.training
        self.batches.append(batch["input_ids"])
        return self.weight.sum() * torch.rand(())


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.zeros(len(rows), longest), torch.zeros(len(rows), longest)
    for index, row in enumerate(rows):
        mask[index, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask}


def trainer(**options: Any) -> Any:
    """As much of a TRL trainer as a plan looks at: ten rows, in batches of four, twice a step."""
    args = {"world_size": 1, "train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": -1, "seed": 0}
    args |= {"num_train_epochs": 3.0, "gradient_checkpointing": False, "eval_strategy": "steps", "eval_steps": 0.2}
    rows = Dataset.from_list([{"input_ids": [7] * length} for length in LENGTHS])
    return SimpleNamespace(
        args=SimpleNamespace(**args | options),
        train_dataset=rows,
        eval_dataset=None,
        data_collator=collate,
        model=Row(),
    )


def planned(of: Any, done: int = 0) -> TrainingPlan:
    result = make_plan(of, lambda model, batch: model(batch), done)
    assert result is not None
    return result


def test_a_plan_counts_steps_passes_and_padding() -> None:
    plan = planned(trainer())
    assert (plan.steps, plan.examples) == (6, 8)  # ten rows are two steps of at most eight
    assert plan.passes == pytest.approx(6 * 8 / 10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    batches = [[LENGTHS[index] for index in order[start : start + 4]] for start in (0, 4, 8)]
    places = sum(len(batch) * max(batch) for batch in batches)
    assert plan.padding == pytest.approx(1 - sum(LENGTHS) / places)
    assert planned(trainer(max_steps=5)).steps == 5
    assert planned(trainer(max_steps=5), done=3).steps == 2
    assert planned(trainer(), done=9).steps == 0


def test_a_batch_of_the_longest_examples_is_trained_on_and_forgotten() -> None:
    of, state = trainer(), torch.get_rng_state()
    planned(of)
    assert [tuple(batch.shape) for batch in of.model.batches] == [(1, 1), (4, 9)]
    assert of.model.weight.grad is None
    assert torch.equal(of.model.weight, torch.ones(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_time_is_that_of_the_places_forward_and_the_tokens_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    # The longest rows have 9, 8, 7 and 6 tokens: 4 x 9 places and 30 tokens in 33 s.
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=itertools.count(0, 33).__next__))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    batches = [[LENGTHS[index] for index in order[start : start + 4]] for start in (0, 4, 8)]
    places, tokens = sum(len(batch) * max(batch) for batch in batches), sum(LENGTHS)
    a_row = (places + tokens) / 2 / 10  # seconds
    assert planned(trainer()).seconds == pytest.approx(6 * 8 * a_row)
    of = trainer()
    of.eval_dataset = Dataset.from_list([{"input_ids": [7]}] * 20)
    assert planned(of).seconds == pytest.approx(
        6 * 8 * a_row + 6 * 20 * places / 10 / 2
    )  # six evaluations, forward only
    of.args.gradient_checkpointing = True
    of.model.gradient_checkpointing_enable = lambda: None
    once = 33 / (2 / 3 * 36 + 1 / 3 * 30)
    expected = 6 * 8 * (2 / 3 * places + 1 / 3 * tokens) / 10 + 6 * 20 * places / 10 / 3
    assert planned(of).seconds == pytest.approx(expected * once)


def test_memory_is_the_peak_with_the_averages_of_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 2**20
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=60 * mib))
    monkeypatch.setattr(plan.psutil, "Process", lambda: process)
    # Of 240 MiB of activations, a quarter is added for gaps; three parameters have 8 bytes each.
    for peaks, expected in (([100 * mib, 300 * mib], 360 * mib + 8 * 3), ([300 * mib, 300 * mib], 300 * mib)):
        values = iter(peaks)
        monkeypatch.setattr(plan, "peak_memory", lambda values=values: next(values))
        assert planned(trainer()).memory == expected  # if loading took more, the rest fits below its peak


def test_batches_without_a_label_are_named() -> None:
    of = trainer()

    def labelled(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        return batch | {"labels": torch.full_like(batch["input_ids"], 7 if len(rows) == 2 else -100)}

    of.data_collator = labelled  # of three batches, the last has two rows
    plan = planned(of)
    assert plan.empty == pytest.approx(2 / 3)
    assert next(plan.notes(10**12)).startswith("67% of the batches have no token to learn, and teach nothing: ")
    assert planned(trainer()).empty == 0


def test_nothing_is_planned_where_nothing_can_be_measured() -> None:
    of = trainer()
    of.train_dataset = iter(())
    assert make_plan(of, lambda model, batch: model(batch)) is None
    assert make_plan(trainer(world_size=2), lambda model, batch: model(batch)) is None


CALM = TrainingPlan(60, 8, 1.0, 0.1, a_step=9.0, besides=60.0, memory=9 * 10**8)
"""Ten minutes, of which one is for what is not a step."""


def test_a_plan_fits_the_minutes() -> None:
    assert CALM.seconds == 600
    assert CALM.within(20) == CALM
    assert CALM.within(5.5) == CALM._replace(steps=30, passes=0.5)
    assert CALM.within(5.5).seconds == 5.5 * 60
    assert CALM.within(0.5).steps == 1


def test_a_plan_advises_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "peak_memory", lambda: 5 * 10**8)
    assert list(CALM.notes(10**9)) == []
    assert "60 steps of 8 examples (1 x the data, 10% padding): about 10 minutes" in CALM.text(torch.device("cpu"))
    [note] = CALM._replace(besides=90_000.0).notes(10**9)
    assert note.startswith("that is more than a day. Fewer --steps")
    [note] = CALM._replace(memory=2 * 10**9).notes(10**9)
    assert note.startswith("only 1 GB of memory are free. --gradient-checkpointing")


def test_durations_are_read_at_a_glance() -> None:
    assert [as_duration(seconds) for seconds in (7.4, 89, 91, 2400, 6000, 40_000)] == [
        *("7 s", "89 s", "2 minutes", "40 minutes", "1.7 hours", "11 hours")
    ]


def test_checkpointing_begins_where_activations_fill_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model: Any = pissa.wrap(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)), r=2)
    # q, k, v, o keep 16 + 16 elements for each token, gate, up, down 16 + 32; in float32, in two blocks.
    a_token = 2 * (4 * 32 + 3 * 48) * 4
    rows = Dataset.from_list([{"input_ids": [7] * length} for length in (3, 25, 10)])
    args = SimpleNamespace(world_size=1, device=torch.device("cpu"), train_batch_size=4, max_length=25)
    for free, expected in ((2 * 100 * a_token, False), (2 * 100 * a_token - 2, True)):
        monkeypatch.setattr(plan, "free_memory", lambda free=free: free)
        for data in (rows, None):
            assert needs_checkpointing(args, model, data) is expected
    assert not needs_checkpointing(SimpleNamespace(**vars(args) | {"world_size": 2}), model, rows)
    assert not needs_checkpointing(SimpleNamespace(**vars(args) | {"device": torch.device("cuda")}), model, rows)
    unknown: Any = SimpleNamespace(base_model=SimpleNamespace(model=nn.Linear(2, 2)))
    assert not needs_checkpointing(args, unknown, rows)


# ---- The command -----------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_will_take(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """README's command, as it stands there, on its table of 300: one pass in steps of eight, a twentieth held out."""
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "examples").symlink_to(pages.ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    [line] = re.findall(r"^pissa finetune .*$", (pages.ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert main(shlex.split(line.replace(pages.MODEL, "base"))[1:]) == 0
    said, out = capsys.readouterr().out, tmp_path / "tickets"
    assert "tickets.csv, 300 examples, " in said
    assert re.search(r"\nheld out  15 of them, chosen at random", said)
    assert re.search(r"\nplan      36 steps of 8 examples \(1 x the data, \d+% padding\): about \d+ s on \d", said)
    assert "Ctrl-C keeps what is learned by then, and --resume goes on" in said
    assert "float32" in said.partition("model ")[2].partition("\n")[0]  # the checkpoint's
    assert f"next      pissa chat {out.name}" in said
    predict = f"pissa predict {out.name} --data NEW.csv --out ANSWERS.csv --columns question=message"
    assert f"\n          {predict}  # a table of new questions, answered\n" in said
    assert len(logged(out)) == 36 == math.ceil(285 / 8)
    assert max(row.get("learning_rate", 0) for row in history(out)) == 2e-4
    assert [row["step"] for row in history(out) if "eval_loss" in row] == [0, 8, 16, 24, 32, 36]
    for label in ("asked", "expected", "before", "after"):
        assert re.search(rf"\n{label:<9} \S", said)

    (tmp_path / "train.jsonl").write_text('{"question": "1+1", "answer": "2"}\n' * 8)
    for name in ("base-train", "base-train-2"):
        assert main(["finetune", "--model", "base", "--data", "train.jsonl", "--steps", "1", "--held-out", "0"]) == 0
        assert "held out" not in capsys.readouterr().out
        assert (tmp_path / name / "adapter_model.safetensors").is_file()


def test_minutes_end_a_run_and_what_resumes_it(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TrainingPlan, "within", lambda self, minutes: self._replace(steps=3))
    arguments = command("finetune", base, data, tmp_path / "run", "--minutes", "5", "--epochs", "2", steps=-1)
    assert main(arguments) == 0
    assert "plan      3 steps of 4 examples" in capsys.readouterr().out
    assert len(logged(tmp_path / "run")) == 3
    cut_last_step(tmp_path / "run", last=3)
    monkeypatch.setattr(TrainingPlan, "within", lambda self, minutes: self._replace(steps=9))
    assert main([*arguments, "--resume"]) == 0
    assert "plan      1 step of 4 examples" in capsys.readouterr().out
    assert logged(tmp_path / "run", "step")[:3] == [1, 2, 3]


def test_what_is_held_out() -> None:
    examples = Dataset.from_list([{"n": n} for n in range(1000)])
    train, held_out = training._hold_out(examples, None, seed=0)
    assert (len(train), len(held_out)) == (950, 50)
    assert sorted([*train["n"], *held_out["n"]]) == list(range(1000))
    for number, expected in ((31, 0), (32, 8), (300, 15), (10_000, 200)):
        rows = Dataset.from_list([{"n": n} for n in range(number)])
        _, some = training._hold_out(rows, None, seed=0)
        assert (0 if some is None else len(some)) == expected
    with pytest.raises(training.UserError, match="--held-out 31: the data has 31 examples; allowed: fewer than that"):
        training._hold_out(examples.take(31), 31, seed=0)


def test_it_is_said_why_nothing_is_held_out(capsys: pytest.CaptureFixture[str]) -> None:
    def said(row: dict[str, Any], number: int, count: int | None) -> str:
        examples, held_out = training._hold_out(Dataset.from_list([row] * number), count, seed=0)
        assert (len(examples), held_out) == (number, None)
        return capsys.readouterr().out

    same = {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}
    assert said({"n": 0}, 31, None).startswith("held out  none, because 31 examples are few; --held-out 5, or a file ")
    assert said(same, 40, None).startswith("held out  none, because they repeat each other; ")
    assert said({"n": 0}, 31, 0) == ""  # as it was asked for


def test_a_gpu_trains_once_the_self_test_has_passed_there(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pissa.cli import selftest

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert not selftest.has_passed_on_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card A")
    assert not selftest.has_passed_on_gpu()
    on_cpu, on_gpu = (SimpleNamespace(device=torch.device(kind)) for kind in ("cpu", "cuda"))
    training._check_device(on_cpu)
    expected = "the CPU: Card A trains unless --use_cpu is given, once `pissa selftest --device cuda` has passed here"
    assert expected in capsys.readouterr().out
    with pytest.raises(training.UserError, match="--use_cpu false: Card A has not been tested; allowed once"):
        training._check_device(on_gpu)
    selftest._passed_file().parent.mkdir(parents=True)
    selftest._passed_file().touch()
    assert selftest.has_passed_on_gpu()
    training._check_device(on_gpu)
    assert "device    Card A: `pissa selftest --device cuda` has passed here" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card B")
    assert not selftest.has_passed_on_gpu()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "holds no run"),
    ],
)
def test_options_that_contradict_each_other(
    options: list[str], message: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    assert message in refused([*command("finetune", base, data, tmp_path / "run"), *options], capsys)


def test_the_dtype_is_the_checkpoints(tmp_path: Path) -> None:
    def own(dtype: str, contents: str = "DENSE") -> str:
        folder: Any = SimpleNamespace(config={"dtype": dtype}, contents=getattr(training.Contents, contents))
        return training._own_dtype(folder)

    assert (own("bfloat16"), own("float32"), own("float16")) == ("bfloat16", "float32", "float32")
    assert own("float16", "RELEASED") == "float16"
