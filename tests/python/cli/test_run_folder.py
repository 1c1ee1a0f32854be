"""The folder of a run: one run takes it, and goes on in it with the same options and data."""

from __future__ import annotations

import fnmatch
import math
import shutil
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import pages
from interrupted import Interrupted
from pissa.cli import main, run_folder
from pissa.cli.options import flag, parse
from pissa.cli.past_run import last_checkpoint
from pissa.cli.plan import TrainingPlan
from pissa.cli.progress import Watch
from pissa.cli.run_folder import MAY_CHANGE, digests_of, taken_folder
from pissa.cli.terminal import UserError
from runs import command, cut_last_step, logged, refused, same_weights, save_sums

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes our options and the trainer's, as far as they matter here. The working directory is an empty one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "_as_yaml", lambda *_: "seed: 0\n")
    ours = SimpleNamespace(model_name_or_path="models/base", dataset_name="rows.jsonl")
    return lambda out="": (ours, SimpleNamespace(output_dir=out, process_index=0))


def test_runs_that_begin_together_have_folders_of_their_own(options: Any) -> None:
    one, two = options(), options()
    with taken_folder(*one), taken_folder(*two):
        names = [training.output_dir for _, training in (one, two)]
        assert names == ["base-rows", "base-rows-2"]
        for name in names:
            Path(name, "adapter").touch()
    assert all(Path(name, "run.yaml").is_file() for name in names)


def test_a_folder_that_a_run_has_taken_is_refused_to_another(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with taken_folder(*options("new/run")):
        with pytest.raises(UserError, match=r"--out new/run is not empty .*go on with that run by --resume"):
            taken_folder(*options("new/run")).__enter__()
        monkeypatch.setattr(run_folder, "check_unused", lambda *_: None)  # both have looked before one has written
        with pytest.raises(UserError, match="--out new/run: another run has just taken it"):
            taken_folder(*options("new/run")).__enter__()
        assert Path("new/run/run.yaml").read_text() == "seed: 0\n"


def test_a_run_that_writes_nothing_leaves_nothing(options: Any) -> None:
    Path("there").mkdir()
    for out in ("", "new/run", "there"):
        with pytest.raises(RuntimeError), taken_folder(*options(out)):
            raise RuntimeError
    assert [path.name for path in Path().iterdir()] == ["there"]
    assert not list(Path("there").iterdir())


def test_a_link_that_leads_nowhere_is_no_new_folder(options: Any) -> None:
    Path("link").symlink_to("nowhere")
    with pytest.raises(UserError, match="--out link leads nowhere; needed: a new folder"):
        taken_folder(*options("link")).__enter__()


def test_a_run_goes_on_with_the_data_with_which_it_began(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = save_sums(tmp_path, rows=40), tmp_path / "run"
    run = command("finetune", base, data, out)
    assert main(run) == 0
    (out / "adapter_model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(reversed(lines)))  # as many, but others are held out
    message = refused([*run, "--resume"], capsys)
    assert "began with other examples: the training and held-out data, or the tokenizer, have changed" in message
    data.write_text("".join(lines))
    assert main([*run, "--resume"]) == 0
    assert same_weights(out, tmp_path)


def test_a_run_goes_on_for_more_steps(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = command("finetune", base, data, tmp_path / "run"), tmp_path / "run"
    assert main(run) == 0
    assert main([*run, "--resume", "--steps", "6"]) == 0
    assert "6 steps in all, where 4 were planned: the learning rate goes on along" in capsys.readouterr().out
    assert logged(out, "step")[:6] == [1, 2, 3, 4, 5, 6]
    # The curve of six steps, of which one warms up. The rate of the fifth is still that of four.
    assert logged(out, "learning_rate")[5] == pytest.approx(1e-2 * (1 + math.cos(math.pi * 4 / 5)) / 2)
    weights = (out / "adapter_model.safetensors").read_bytes()
    assert main(["finetune", "--config", str(out / "run.yaml"), "--resume"]) == 0
    assert "\nplan      no step is left; larger --steps, --epochs or --minutes train on" in capsys.readouterr().out
    assert (out / "adapter_model.safetensors").read_bytes() == weights


def test_other_minutes_count_from_where_a_run_goes_on(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a checkpoint has been made within them, a run that goes on as it is recorded has as many steps."""
    out = tmp_path / "run"
    assert main(command("finetune", base, data, out, "--epochs", "2", steps=-1)) == 0
    cut_last_step(out, last=12)
    run = ["finetune", "--config", str(out / "run.yaml"), "--resume"]
    minutes = []

    def within(self: TrainingPlan, limit: float) -> TrainingPlan:
        minutes.append(limit)
        return self._replace(steps=3)

    monkeypatch.setattr(TrainingPlan, "within", within)
    for step, recorded in ((1, None), (3, 5)):  # a step before a checkpoint, and one after it
        interrupt = Interrupted(Watch.on_step_end, at=step)
        with monkeypatch.context() as patch:
            patch.setattr(Watch, "on_step_end", lambda *args, interrupt=interrupt, **_: interrupt(*args))
            assert main([*run, "--minutes", "5", "--epochs", "3"]) == 130
        assert yaml.safe_load((out / "run.yaml").read_text())["minutes"] == recorded
    assert minutes == [5, 5]
    assert main(run) == 0
    assert minutes == [5, 5]
    assert logged(out, "step")[:13] == [*range(1, 14)]


@pytest.mark.parametrize(("what", "patterns"), MAY_CHANGE.items())
def test_what_a_resumed_run_may_change_is_written_down(what: str, patterns: tuple[str, ...]) -> None:
    known = {f.name for part in parse(Namespace(argv=[], config=None), "SFT") for f in fields(part)}
    assert all(fnmatch.filter(known, pattern) for pattern in patterns)
    options = ", ".join(f"`{flag(pattern)}`" for pattern in patterns)
    assert f"| {what} | {options} |" in (pages.ROOT / "docs/trainers.md").read_text().splitlines()


def test_the_digest_is_that_of_the_examples_in_their_order() -> None:
    from datasets import Dataset

    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}]

    def of(rows: list[dict[str, list[int]]]) -> str:
        return digests_of(Dataset.from_list(rows), None)["training"]

    assert of(rows) == of([dict(reversed(row.items())) for row in rows])
    for others in (rows[::-1], rows[:1], [rows[0], {"input_ids": [3], "labels": [4]}]):
        assert of(others) != of(rows)
    both = digests_of(Dataset.from_list(rows), Dataset.from_list(rows[:1]))
    assert both == {"training": of(rows), "held-out": of(rows[:1])}
    assert digests_of(Dataset.from_list(rows).to_iterable_dataset(), Dataset.from_list([{"images": []}])) == {}


def test_a_run_goes_on_from_its_latest_complete_checkpoint(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, state in {9: "{}", 100: "{}", 10: "{}", 150: '{"epoch": 1', 200: None}.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    shutil.copytree(tmp_path / "checkpoint-9", tmp_path / "checkpoint-9-good")
    with pytest.raises(UserError, match="'checkpoint-9-good', which would be deleted as an old checkpoint; give it"):
        last_checkpoint(tmp_path)
