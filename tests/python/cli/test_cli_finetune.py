"""`pissa finetune` on a small random model: what it writes, prints, refuses, and how it resumes."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from transformers import AutoModelForCausalLM, AutoTokenizer

import pissa
import runs
from daily import each
from pissa import ops
from pissa.base.weights import CodedLinear
from pissa.cli import main, training
from pissa.cli.options import adapter_config, parse, rate_of
from pissa.cli.verification import Step0
from released_folders import release
from runs import cut_last_step, exact, history, logged, refused, same_weights, save_preferences, save_sums

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

METHODS = {
    "lora": ["--init", "lora"],
    "pissa": [],
    "qpissa": ["--quant", "nf4"],
    "qpissa int8": ["--quant", "int8"],
    "qpissa in integers": ["--quant", "nf4", "--precision", "int8"],
    "qpissa calibrated": ["--quant", "nf4", "--repair", "activations", "--error-feedback", "True"],
}
STEPS = 4


class Run(NamedTuple):
    """A finished run: its folder, and what it said."""

    folder: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Trains by a method, the first time that it is asked for. The folders are not to be changed."""

    @functools.cache
    def run(method: str) -> Run:
        if method == "qpissa in integers" and not ops.build_info()["int8"]:
            pytest.skip("this processor multiplies no bytes")
        out = tmp_path_factory.mktemp("runs") / "new" / "run"
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as errors:
            assert main(command(base, data, out, *METHODS[method], "--eval-data", str(data))) == 0
        return Run(out, said.getvalue(), errors.getvalue())

    return run


def command(base: Path, data: Path, out: Path, *more: str, steps: int = STEPS) -> list[str]:
    return runs.command("finetune", base, data, out, "--rank", "4", *more, steps=steps)


@pytest.mark.parametrize("method", each(METHODS, ["lora", "qpissa", "qpissa calibrated"]))
def test_a_run_leaves_adapter_and_losses(method: str, trained: Callable[[str], Run]) -> None:
    out, said, errors = trained(method)
    held_out, steps = ([row for row in history(out) if key in row] for key in ("eval_loss", "loss"))
    assert [row["step"] for row in held_out] == [0, 1, 2, 3, 4]  # before, and after each fifth
    first, *_, last = held_out
    assert last["eval_loss"] < first["eval_loss"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(row["seconds"] > 0 and row["peak_memory_mib"] > 50 for row in steps)
    # Warm-up of ceil(0.03 * 4) steps from the rate 0, then half a cosine down to 0 after the last step.
    cosine = [1e-2 * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    assert [row["learning_rate"] for row in steps] == pytest.approx([0, *cosine])

    assert (out / "adapter_model.safetensors").is_file()
    # No pickle: a run's folder is given away, its checkpoints are not.
    suffixes = {path.suffix for path in out.iterdir() if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".yaml", ".jinja", ".md"}
    assert not list(out.rglob("training_args.bin"))
    run = yaml.safe_load((out / "run.yaml").read_text())
    quant = dict(itertools.pairwise(METHODS[method])).get("--quant")
    assert (run["quant"], run["r"], run["lora_alpha"], run["init"]) == (
        quant,
        4,
        4,
        "lora" if method == "lora" else "pissa",
    )
    assert json.loads((out / "pissa.json").read_text())["config"]["quant"] == quant

    for label in ("model", "data", "held out", "method", "check", "loss", "cost", "saved", "next"):
        assert f"\n{label:<9} " in f"\n{said}"
    for row in held_out:
        assert re.search(rf"^{row['step']} .* {row['eval_loss']:.4f} *{row.get('right', '')}$", said, re.MULTILINE)
    assert f"loss {first['eval_loss']:.4f} before, {last['eval_loss']:.4f} after" in said
    # Two layers of q, k, v, o, gate, up, down: 4 (in + out) of each
    assert f"{2 * 4 * (64 + 48 + 48 + 64 + 88 + 88 + 88):,} trainable parameters" in said
    rate = (steps[-1]["num_tokens"] - steps[0]["num_tokens"]) / sum(row["seconds"] for row in steps[1:])
    assert f"(median), {rate:,.0f} tokens a second, peak" in said
    assert f", {rate:,.0f} tokens/s, loss {steps[-1]['loss']:.3f}" in errors
    assert "{'loss'" not in said
    assert "training: 4/4 " in errors
    for noise in ("Map:", "Warning", "Loading weights"):
        assert noise not in errors
    assert "PiSSA init" in errors


def test_the_card_of_a_run_is_true(
    base: Path,
    data: Path,
    trained: Callable[[str], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its commands and its Python run as they are printed, also once the run and its base have been moved. It contains
    no path, calls only PiSSA so, and says how good the adapter is."""
    out = shutil.copytree(trained("qpissa").folder, tmp_path / "run")
    _, metadata, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(metadata)["tags"] == ["lora", "pissa", "trl"]
    assert "base_model" not in yaml.safe_load(metadata)
    assert f"A QPiSSA (nf4) adapter for {base.name}, trained on {data.name} by `pissa finetune`" in text
    assert str(base.parent) not in text
    assert str(trained("qpissa").folder.parent) not in text
    losses = logged(out, "eval_loss")
    assert f"\nHeld-out loss: {losses[-1]:.4f}, {losses[0]:.4f} before training.\n" in text
    right = logged(out, "right")
    assert f"\nRight answers: {right[-1]} of 24 held out, {right[0]} before training. Right means equal to " in text
    of_lora = (trained("lora").folder / "README.md").read_text()
    assert "A LoRA adapter for " in of_lora
    assert "pissa\n" not in of_lora.split("---\n")[1]

    shutil.copytree(base, tmp_path / base.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("17+1"))
    capsys.readouterr()
    for language, block in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(compile(block, "README.md", "exec"), {})
        else:
            assert main(shlex.split(block)[1:]) == 0
    assert (tmp_path / "NEW_FOLDER" / "model.safetensors").is_file()


def test_methods_see_the_same_batches_and_start_from_the_same_function(
    base: Path, data: Path, tmp_path: Path, trained: Callable[[str], Run]
) -> None:
    lora, ours = logged(trained("lora").folder), logged(trained("pissa").folder)
    assert lora[:2] == pytest.approx(ours[:2], rel=1e-5)  # the first step has the rate 0
    assert lora[2] != ours[2]
    run = trained("lora").folder / "run.yaml"
    assert main(["finetune", "--config", str(run), "--output_dir", str(tmp_path / "again")]) == 0
    assert exact(tmp_path / "again") == exact(run.parent)
    assert main(command(base, data, tmp_path / "seed", "--seed", "1", steps=1)) == 0
    assert logged(tmp_path / "seed")[0] != ours[0]


@pytest.mark.parametrize("method", each(METHODS, ["qpissa", "qpissa in integers"]))
def test_a_resumed_run_equals_an_uninterrupted_one(
    method: str, base: Path, data: Path, tmp_path: Path, trained: Callable[[str], Run]
) -> None:
    whole, cut = trained(method).folder, tmp_path / "cut"
    options = [*METHODS[method], "--eval-data", str(data), "--resume"]
    shutil.copytree(whole, cut)
    cut_last_step(cut)
    # An earlier version had no such option.
    options_then = [line for line in (cut / "run.yaml").read_text().splitlines() if "quant_storage" not in line]
    (cut / "run.yaml").write_text("\n".join(options_then))

    assert main(command(base, data, cut, *options)) == 0
    assert exact(cut) == exact(whole)
    assert same_weights(cut, whole)
    optimizers = [torch.load(run / f"checkpoint-{STEPS}" / "optimizer.pt")["state"] for run in (cut, whole)]
    for mine, theirs in zip(*(optimizer.values() for optimizer in optimizers), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert main(command(base, data, cut, *options)) == 0  # there is nothing left to do
    assert exact(cut) == exact(whole)


def interrupted(
    times: int, monkeypatch: pytest.MonkeyPatch, arguments: list[str], by: signal.Signals = signal.SIGINT
) -> int:
    """The exit code of a command that gets so many Ctrl-C, or other signals, in its second step."""
    from pissa.cli.training import Watch

    begun = []

    def interrupt(self: Any, *args: Any, **kwargs: Any) -> None:
        begun.append(self)
        for _ in range(times if len(begun) == 2 else 0):
            signal.raise_signal(by)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_begin", interrupt)
        return main(arguments)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(
    by: signal.Signals,
    base: Path,
    data: Path,
    tmp_path: Path,
    trained: Callable[[str], Run],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, out = trained("pissa").folder, tmp_path / "run"
    before = signal.getsignal(by)
    # No checkpoint is due then.
    arguments = command(base, data, out, "--eval-data", str(data), "--save-steps", "3")
    assert interrupted(1, monkeypatch, arguments, by) == 130
    assert signal.getsignal(by) is before
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("pissa finetune: interrupted; saved after step 2; --minutes N can limit the rest; go on")
    assert (out / "checkpoint-2").is_dir()
    assert main(told.partition("go on by: pissa ")[2].split()) == 0
    assert exact(out) == exact(whole)
    assert same_weights(out, whole)


def test_a_second_ctrl_c_ends_at_once(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(base, data, tmp_path / "run", steps=2)
    assert interrupted(2, monkeypatch, arguments) == 130
    assert "interrupted; a run that has begun goes on with --resume" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert main([*arguments, "--resume"]) == 0
    assert "\nresume    from the beginning: no checkpoint was kept\n" in capsys.readouterr().out
    assert logged(tmp_path / "run", "step")[:2] == [1, 2]


def test_sigterm_before_the_training_leaves_nothing(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "_model", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(command(base, data, tmp_path / "run")) == 130
    assert "interrupted; a run that has begun goes on with --resume" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_logits_that_are_no_numbers_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_batches", lambda *_: [{}])
    monkeypatch.setattr(training, "step0_check", lambda *_: Step0(math.nan, 1.0))
    assert training._check(SimpleNamespace(model=None))["passed"] is False


def test_the_check_computes_the_logits_of_one_example(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a large vocabulary, those of a whole batch take more memory than the training."""
    sizes = []

    def step0(_: Any, batch: dict[str, torch.Tensor]) -> Step0:
        sizes.append(len(batch["input_ids"]))
        return Step0(0.0, 1.0)

    monkeypatch.setattr(training, "step0_check", step0)
    assert main(command(base, data, tmp_path / "run", steps=1)) == 0
    assert sizes == [1]


@pytest.mark.parametrize("difference", [0.5, math.nan])
def test_a_model_that_mixes_packed_texts_is_refused(
    difference: float,
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training, "packing_check", lambda *_: difference)
    assert main(command(base, data, tmp_path / "run", "--packing", "true", "--max-length", "64")) == 2
    assert "mixes the texts of a row: logits differ" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*"))


def test_json_is_all_there_is_on_stdout(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(command(base, data, out, "--json", "--eval-data", str(data), steps=1)) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["losses"] == logged(out)
    assert result["held_out"] == logged(out, "eval_loss")
    assert result["check"]["passed"] is True
    before, after = logged(out, "right")
    assert result["right"] == {"before": before, "after": after, "of": 24, "most_frequent": 1}
    assert "\nsaved" in captured.err


@pytest.mark.nightly
def test_nothing_but_progress_bars_goes_to_stderr(base: Path, data: Path, tmp_path: Path) -> None:
    arguments = command(base, data, tmp_path / "run", "--quant", "nf4", "--eval-data", str(data), steps=1)
    run = subprocess.run(
        [sys.executable, "-m", "pissa", *arguments],
        env={**os.environ, "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0
    assert run.stderr == ""
    assert "saved" in run.stdout


# ---- Refusals ----


def test_nothing_is_overwritten(
    base: Path, data: Path, tmp_path: Path, trained: Callable[[str], Run], capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained("pissa").folder
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "is not empty" in (message := refused(command(base, data, out), capsys))
    assert "--resume" in message
    message = refused(command(base, data, out, "--resume", "--quant", "nf4", "--seed", "3"), capsys)
    assert "--quant was None, is nf4; --seed was 0, is 3" in message
    assert f"--eval-data was {data}, is None" in message
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    other = tmp_path / "other"
    other.mkdir()
    assert "holds no run (run.yaml is missing)" in refused(command(base, data, other, "--resume"), capsys)
    for content in (b"[1]", b"a: [", b"\xff", b"", 3000 * b"["):
        (other / "run.yaml").write_bytes(content)
        assert f"{other}/run.yaml cannot be read: " in refused(command(base, data, other, "--resume"), capsys)
    (other / "run.yaml").unlink()
    (other / "mine.txt").write_text("x")
    assert "(mine.txt)" in (message := refused(command(base, data, other), capsys))
    assert "--resume" not in message
    assert "is a file" in refused(command(base, data, other / "mine.txt"), capsys)


def test_wrong_paths_and_models_are_refused(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert "no such file" in refused(command(base, tmp_path / "no.jsonl", out), capsys)
    assert "needed: a folder that save_pretrained wrote" in refused(command(tmp_path, data, out), capsys)
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    assert f"--model {broken}" in refused(command(broken, data, out), capsys)
    encoder = tmp_path / "encoder"
    shutil.copytree(base, encoder)
    (encoder / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    assert "causal language model" in refused(command(encoder, data, out), capsys)
    assert not out.exists()


def test_a_run_in_place_of_a_model_is_refused_with_the_commands_to_go_on(
    base: Path,
    data: Path,
    tmp_path: Path,
    trained: Callable[[str], Run],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of them runs as it is printed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained("pissa").folder, folder := tmp_path / "a run")
    for name, records in (("finetune", data), ("dpo", save_preferences(tmp_path))):
        message = refused(runs.command(name, folder, records, tmp_path / "new"), capsys)
        assert f"--model {folder}: it is the folder of a run, not of a model; to continue it: " in message
        resume, merge = (shlex.split(found) for found in re.findall("`(.*?)`", message))
        assert resume == ["pissa", "finetune", "--config", str(folder / "run.yaml"), "--resume"]
    assert main(merge[1:]) == 0
    assert main(command(tmp_path / "NEW_FOLDER", data, tmp_path / "new", steps=1)) == 0

    (folder / "adapter_config.json").unlink()  # as before the end of a run
    message = refused(command(folder, data, tmp_path / "other"), capsys)
    assert f"`pissa merge '{folder}/checkpoint-4' NEW_FOLDER`, then give NEW_FOLDER as the model" in message
    for other in (
        ["init", str(folder), "other"],
        ["export", str(folder / "checkpoint-4"), "other", "--to", "vllm", "--base", str(folder)],
    ):
        assert f"{folder}: it is the folder of a run, not of a model; to continue it: `" in refused(other, capsys)
    message = refused(command(folder / "checkpoint-4", data, tmp_path / "other"), capsys)
    assert "it is the folder of an adapter, not of a model; to train on from what it has learned: `pissa" in message
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("option", ["--out", "--data", "--model"])
def test_a_name_that_is_not_utf8_is_refused(
    option: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    if option == "--model":
        shutil.copytree(base, name)
    elif option == "--data":
        shutil.copy(data, name)
    message = refused(command(base, data, tmp_path / "run", option, str(name), steps=1), capsys)
    assert rf"{option}: the name b'{tmp_path}/caf\xe9.jsonl' is not UTF-8" in message
    assert not (tmp_path / "run").exists()
    assert name.exists() == (option != "--out")


@pytest.mark.parametrize(
    ("name", "where", "options"),
    [
        ("finetune", "train", []),
        ("finetune", "train", ["--quant", "nf4", "--repair", "activations"]),
        ("finetune", "held out", []),
        ("finetune", "padding", []),
        ("dpo", "train", []),
        ("chat", "", []),
    ],
)
def test_a_token_without_an_embedding_is_named(
    name: str, where: str, options: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(base, model := tmp_path / "model"))
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    if where != "padding":
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(model)
    if name == "chat":
        message = refused(["chat", str(model), "--prompt", "<new>"], capsys)
    else:
        data = (save_preferences if name == "dpo" else save_sums)(tmp_path)
        if where == "held out":
            shutil.copy(data, held_out := tmp_path / "held_out.jsonl")
            options = [*options, "--eval-data", str(held_out)]
        if where != "padding":
            with data.open("a") if where == "train" else held_out.open("a") as file:
                row = json.loads(data.read_text().splitlines()[0])
                file.write(json.dumps(row | {list(row)[-1]: "<new>"}))
        assert main(runs.command(name, model, data, tmp_path / "run", *options)) == 2
        message = capsys.readouterr().err.splitlines()[-1]
    last = len(tokenizer) - 1
    assert f"the tokenizer's token '<new>' has the id {last}, and the model has {last} embeddings" in message
    assert f"call its resize_token_embeddings({last + 1})" in message
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_wrong_arguments_are_refused(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert "--model is missing" in refused(["finetune", "--data", str(data), "--out", str(out)], capsys)
    message = "quant_iters: got 2 without quant, and nothing else is quantised"
    assert message in refused(command(base, data, out, "--quant-iters", "2"), capsys)
    assert "no prompt of 24 is shorter" in refused(command(base, data, out, "--max-length", "2"), capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank_pattern", "q_proj=8"], "got 'q_proj=8'; allowed: JSON, such as"),
        (["--quant-storage", "one"], "invalid choice: 'one' (choose from"),
    ],
)
def test_wrong_values_of_other_options_are_refused(
    options: list[str], message: str, base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["finetune", "--model", str(base), "--data", str(data), *options], capsys)


def test_an_adapter_that_starts_wrong_is_not_trained(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pissa

    wrap = pissa.wrap

    def broken(*args: Any, **kwargs: Any) -> Any:
        model = wrap(*args, **kwargs)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name).add_(1e-2)
        return model

    monkeypatch.setattr("pissa.wrap", broken)
    assert main(command(base, data, tmp_path / "run")) == 1
    assert "FAILED" in capsys.readouterr().out
    assert not (tmp_path / "run" / "run.yaml").exists()


@pytest.mark.parametrize("method", each(METHODS, ["qpissa"]))
def test_bfloat16_trains_for_epochs_of_accumulated_batches(method: str, base: Path, data: Path, tmp_path: Path) -> None:
    arguments = command(base, data, tmp_path / "run", "--epochs", "1.5", "--grad-accum", "2", *METHODS[method])
    del arguments[arguments.index("--steps") : arguments.index("--steps") + 2]
    assert main([*arguments, "--dtype", "bfloat16"]) == 0
    losses = logged(tmp_path / "run")
    assert len(losses) == 5  # ceil(1.5 * 24 / (4 * 2))
    assert losses[-1] < losses[0]


RATES = {"": 2e-4, "--init lora": 1e-3, "--init lora --use-rslora": 2e-4, "--init lora --lr 1e-4": 1e-4}


@pytest.mark.parametrize(("options", "rate"), RATES.items())
def test_the_rate_that_is_not_given_suits_the_start(options: str, rate: float) -> None:
    args = argparse.Namespace(argv=["--model", "m", "--data", "d", *options.split()], config=None)
    ours, trainers = parse(args, "SFT")
    assert (trainers.learning_rate or rate_of(adapter_config(ours, seed=0))) == rate


# ---- The command itself ----


def test_help_all_shows_trls_options_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--help-all"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for default in ("pissa", "16", "uint8", "8", "0.03", "100"):
        assert f"(default: {default})" in text
    for name in ("--model", "--data", "--out", "--rank", "--lr", "--steps", "--gradient-checkpointing", "--use_dora"):
        assert f" {name}" in text


def test_help_and_env_import_nothing_heavy() -> None:
    """`python -m pissa` is the report, for which torch is enough."""
    script = (
        "import contextlib, runpy, sys\n"
        "def imported(arguments):\n"
        "    sys.argv = ['pissa', *arguments]\n"
        "    with contextlib.suppress(SystemExit): runpy.run_module('pissa', run_name='__main__')\n"
        "    heavy = {'torch', 'numpy', 'transformers', 'peft', 'matplotlib', 'accelerate', 'trl', 'tqdm', 'yaml'}\n"
        "    print(sorted(heavy & set(sys.modules)))\n"
        "imported(['--help']); imported([])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    of_help, _, report = done.stdout.partition("[]\n")
    assert "finetune" in of_help
    verdict, modules = report.splitlines()[-2:]
    assert verdict.startswith("verdict")
    assert set(json.loads(modules.replace("'", '"'))) <= {
        "torch",
        "numpy",
        "tqdm",
    }  # torch imports the last one if it is there


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "usage: pissa [-h] [--version] COMMAND ..."), (["--version"], "pissa 0.")]
)
def test_without_a_command_there_is_help(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(said)


def test_a_locale_of_ascii_and_names_with_spaces(base: Path, tmp_path: Path) -> None:
    """What it lacks is shown by question marks, and what is to be run next can be copied to a shell."""
    data, out, model = tmp_path / "sümme.jsonl", tmp_path / "my run", tmp_path / "my base"
    data.write_text("".join(json.dumps({"question": "é" * 150, "answer": f"{i}"}) + "\n" for i in range(8)))
    model.symlink_to(base)
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    arguments = [*command(model, data, out, steps=1), "--held-out", "2", "--rank", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "pissa", *arguments], capture_output=True, text=True, env=os.environ | ascii_only
    )
    assert done.returncode == 0, done.stderr
    assert f"data      {tmp_path}/s??mme.jsonl, 8 examples" in done.stdout
    assert f"saved     {out}: the adapter; run.yaml, data.json and checkpoints, which only --resume" in done.stdout
    assert {path.name for path in out.iterdir()} >= {"run.yaml", "data.json"}
    following = done.stdout.partition("\nnext ")[2].splitlines()
    assert "Ollama" in following[2]
    assert [shlex.split(line, comments=True) for line in following] == [
        ["pissa", "chat", str(out)],
        ["pissa", "predict", str(out), "--data", "NEW.jsonl", "--out", "ANSWERS.jsonl"],
        ["pissa", "export", str(out), f"{out}.gguf", "--to", "gguf-model"],
        ["pissa", "merge", str(out), "NEW_FOLDER"],
    ]


def test_the_environment_report(capsys: pytest.CaptureFixture[str]) -> None:
    import pissa
    from pissa.cli.env import environment

    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert text.strip().split("\n")[-1].startswith("verdict")
    report = environment()
    assert report["fits"] is True
    assert report["pissa"] == pissa.__version__
    assert report["torch"].startswith(torch.__version__)
    assert report["build: isa"] == pissa.build_info()["isa"]
    assert report["build: isas_unused"] == pissa.build_info()["isas_unused"]
    assert all(reason in text for reason in report["build: isas_unused"])
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("cores").startswith(f"{os.cpu_count()}; in the last minute")
    assert found == {name: value for name, value in report.items() if name != "cores"}


def test_the_environment_report_names_the_variables_that_are_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PISSA_ISA", "avx2")
    monkeypatch.setenv("PISSA_COMPOSITE", "1")
    monkeypatch.setattr("pissa.ops._load.FORCED", True)
    assert main(["env"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["PISSA_ISA", "avx2"] in lines
    assert ["PISSA_COMPOSITE", "1: PyTorch's operations compute, and pissa's kernels do not"] in lines


def test_the_environment_report_asks_for_what_the_package_asks_for() -> None:
    from pissa.cli import env

    asked = [Requirement(line) for line in requires("pissa") or []]
    extras = [{"extra": extra} for extra in ("", "hf", "cli")]
    ours = [one for one in asked if one.marker is None or any(map(one.marker.evaluate, extras))]
    least = {one.name: str(one.specifier) for one in ours if one.name != "pissa"}
    assert {name: f">={version}" for name, version in env.needed().items()} == least


def test_the_environment_report_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pissa.cli import env

    version = env._version
    monkeypatch.setattr(env, "_version", lambda name: "0.4.9" if name == "safetensors" else version(name))
    assert main(["env"]) == 1
    assert "safetensors 0.4.9 is older than 0.8: run `pip install --upgrade safetensors`" in capsys.readouterr().out
    monkeypatch.setattr(env, "_version", lambda name: None if name == "xxhash" else version(name))
    assert main(["env"]) == 0
    assert "also run `pip install xxhash`, or install pissa[cli]" in capsys.readouterr().out.split("\n")[-2]


@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_a_released_model_is_trained_as_it_is(
    init: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In FP8, which transformers would expand on a CPU: it is not asked."""
    monkeypatch.setattr(training, "create_model_from_path", None)
    folder, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(
        base, folder, ignore=lambda _, names: [name for name in names if "model" in name or "config" in name]
    )
    release(AutoModelForCausalLM.from_pretrained(base), "fp8-tiles", folder)
    for name in ("tokenizer_config.json", "generation_config.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    codes = (folder / "model.safetensors").read_bytes()
    assert main(command(folder, data, out, "--init", init, "--eval-data", str(data))) == 0
    first, *_, last = [row for row in history(out) if "eval_loss" in row]
    assert last["eval_loss"] < first["eval_loss"]
    model = pissa.load(folder, adapter=out)
    assert {module.format for module in model.modules() if isinstance(module, CodedLinear)} == {"fp8"}
    assert (folder / "model.safetensors").read_bytes() == codes
