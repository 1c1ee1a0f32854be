"""`pissa finetune` on a folder that `pissa init` has written, and with gradient checkpointing."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import pytest
import yaml
from transformers.models.llama.modeling_llama import LlamaAttention

import pissa
import runs
from adapter_files import content
from pissa.checkpoints.init import init
from pissa.cli import main, training
from runs import WEIGHTS, cut_last_step, exact, logged, same_weights

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


@pytest.fixture(scope="module")
def split(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "split"
    init(base, folder, pissa.PissaConfig(r=4, quant="nf4"))
    return folder


def command(model: Path, data: Path, out: Path, *more: str, steps: int = 4) -> list[str]:
    return runs.command("finetune", model, data, out, *more, steps=steps)


@pytest.fixture(scope="module")
def trained(split: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run on the split model, and what it said. It is not to be changed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as errors:
        assert main(command(split, data, out)) == 0
    return out, said.getvalue(), errors.getvalue()


def test_it_is_the_run_of_the_dense_model(
    base: Path, split: Path, data: Path, tmp_path: Path, trained: tuple[Path, str, str]
) -> None:
    out, said, errors = trained
    assert "QPiSSA (nf4), rank 4" in said
    assert f"pissa.load({str(split)!r}, adapter={str(out)!r}) has it exactly" in said
    assert "PiSSA init" not in errors
    assert "Warning" not in errors
    assert main(command(base, data, tmp_path / "dense", "--rank", "4", "--quant", "nf4")) == 0
    assert exact(out) == exact(tmp_path / "dense")
    ours, dense_ours = content(out), content(tmp_path / "dense")
    assert ours["adapter_model"] == dense_ours["adapter_model"]
    assert ours["pissa"] == dense_ours["pissa"]
    assert (out / "adapter_config.json").read_bytes() == (tmp_path / "dense" / "adapter_config.json").read_bytes()
    run, dense = (yaml.safe_load((folder / "run.yaml").read_text()) for folder in (out, tmp_path / "dense"))
    assert (run["quant"], run["r"], run["dtype"]) == ("nf4", 4, "float32")
    assert {name for name in run if run[name] != dense[name]} <= {"model_name_or_path", "output_dir", "target_modules"}


@pytest.mark.parametrize(
    "options", [("--quant", "nf4"), ("--quant", "nf4", "--calibrate", "True", "--dtype", "bfloat16")]
)
def test_a_dense_model_is_quantised_without_being_loaded(
    options: tuple[str, ...], base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bits of a model that transformers has loaded, as it still does where the weights are pickles."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "create_model_from_path", None)
        assert main(command(base, data, tmp_path / "by_matrix", "--rank", "4", *options)) == 0
    monkeypatch.setattr(training, "has_safetensors", lambda folder: False)
    assert main(command(base, data, tmp_path / "loaded", "--rank", "4", *options)) == 0
    assert exact(tmp_path / "by_matrix") == exact(tmp_path / "loaded")
    assert content(tmp_path / "by_matrix") == content(tmp_path / "loaded")


def test_it_is_resumed(split: Path, data: Path, tmp_path: Path, trained: tuple[Path, str, str]) -> None:
    """What the folder has settled may be said."""
    cut = Path(shutil.copytree(trained[0], tmp_path / "cut"))
    cut_last_step(cut)
    assert main(command(split, data, cut, "--resume", "--rank", "4", "--quant", "nf4")) == 0
    assert exact(cut) == exact(trained[0])
    assert same_weights(cut, trained[0])


def test_gradient_checkpointing_changes_no_bit(
    split: Path, data: Path, tmp_path: Path, trained: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, *x, **y: calls.append(self) or forward(self, *x, **y))
    assert main(command(split, data, tmp_path / "run", "--gradient-checkpointing")) == 0
    # Of two layers: three times to try the fused head, twice to check the start, twice in each of two batches that are
    # timed, and of four steps.
    assert len(calls) == 2 * (3 + 2 + 2 * 2 + 2 * 4)
    assert logged(tmp_path / "run") == logged(trained[0])
    assert same_weights(tmp_path / "run", trained[0])


def test_alternations_are_those_of_the_folder(
    base: Path, data: Path, tmp_path: Path, trained: tuple[Path, str, str]
) -> None:
    init(base, tmp_path / "model", pissa.PissaConfig(r=4, quant="nf4", quant_iters=2))
    assert main(command(tmp_path / "model", data, tmp_path / "split", steps=1)) == 0
    options = ["--rank", "4", "--quant", "nf4", "--quant-iters", "2"]
    assert main(command(base, data, tmp_path / "dense", *options, steps=1)) == 0
    assert exact(tmp_path / "split") == exact(tmp_path / "dense")
    assert logged(tmp_path / "split")[0] != logged(trained[0])[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "8"], "--rank 8: {model} was split with --rank 4; leave --rank out"),
        (["--quant", "int8"], "--quant int8: {model} was split with --quant nf4; leave --quant out"),
        (["--quant-iters", "3"], "--quant-iters 3: {model} was split with --quant-iters 1; leave --quant-iters out"),
        (["--init", "lora"], "--init lora: {model} was split with --init pissa; leave --init out"),
    ],
)
def test_what_the_folder_has_settled_is_not_asked_for(
    options: list[str], words: str, split: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(command(split, data, tmp_path / "run", *options)) == 2
    assert words.format(model=split) in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_damaged_folder_is_named(split: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(split, tmp_path / "folder"))
    (folder / "pissa_init" / WEIGHTS).unlink()
    assert main(command(folder, data, tmp_path / "run")) == 2
    assert f"{WEIGHTS} is missing" in capfd.readouterr().err
