"""`pissa selftest`: passes where all is right, and names what is wrong, whatever that is."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import pissa
from cuda_stand_in import DEVICE, CudaStandIn
from pissa import ops
from pissa.cli import main, selftest
from pissa.cli.verification import wrong_in_linear, wrong_in_model
from pissa.layers.layer import pissa_layers

CPU = torch.device("cpu")


@pytest.fixture
def only_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the models out, which take seconds."""
    monkeypatch.setattr(selftest, "find_spec", lambda package: None)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["selftest", *arguments])
    out, err = capsys.readouterr()
    assert (code == 2) == bool(err)
    return code, out + err


def failed(out: str) -> set[str]:
    return set(re.findall(r"^  (\S.*?) \.+ FAILED", out, flags=re.MULTILINE))


def test_all_is_right_without_network_and_without_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"asks for the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out = run(capsys, "--device", "cpu")
    assert (code, failed(out)) == (0, set())
    forms = len(ops.formats.FORMATS) + 1
    count = len(re.findall(r" \.+ ok ", out))
    assert count == 1 + 3 * forms + (forms - 1) + forms
    assert f"{count} of {count} checks passed" in out
    assert "`pissa env`" in out.splitlines()[-2]
    assert max(map(len, out.splitlines()[1:])) < 80
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("only_ops")
def test_without_peft_the_ops_are_tested_and_a_gpu_after_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    with CudaStandIn():
        code, out = run(capsys)
        assert list(wrong_in_linear("nf4", torch.bfloat16, DEVICE)) == []
    assert (code, failed(out)) == (0, set())
    assert out.index("\ncpu: ") < out.index("\ncuda: ") < out.index(": some GPU\n")
    assert "Models were not tested: PEFT is not installed; run `pip install peft`" in out


@pytest.mark.usefixtures("only_ops")
def test_a_gpu_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out = run(capsys, "--device", "cuda")
    assert (code, "--device cuda: torch finds no GPU here" in out) == (2, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("pissa.ops._load.cuda_problem", "torch is built for CUDA 12.8")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    with CudaStandIn():
        monkeypatch.setattr("pissa.ops._load.cuda_problem", "torch is built for CUDA 12.8")
        code, out = run(capsys)
    assert (code, "\nPyTorch's operations compute there: torch is built for CUDA 12.8\n" in out) == (0, True)
    code, out = run(capsys, "--device", "cpu")
    assert (code, "GPU" in out) == (0, False)


# ---- Planted defects -------------------------------------------------------------------------------------------------

LINEAR = ops.linear


def of_int8(weight: Any) -> bool:
    return isinstance(weight, ops.QuantizedWeight) and weight.format == "int8"


def half_gradient(x: Any, weight: Any, *args: Any, a: Any, **kwargs: Any) -> Any:
    """Right but for the gradient of a."""
    return LINEAR(x, weight, *args, a=a.detach() + (a - a.detach()) / 2, **kwargs)


PLANTED: dict[str, tuple[Callable[..., Any], str]] = {
    "output": (lambda x, w, *args, **kw: LINEAR(x, w, *args, **kw) * (1.5 if of_int8(w) else 1), "int8 w"),
    "few rows": (lambda x, *args, **kw: LINEAR(x, *args, **kw) * (1.5 if len(x) < 16 else 1), "linear"),
    "NaN": (lambda *args, **kw: LINEAR(*args, **kw) * torch.nan, "linear"),
    "gradient": (half_gradient, " weight, "),
}


@pytest.mark.usefixtures("only_ops")
@pytest.mark.parametrize("defect", PLANTED)
def test_a_wrong_op_is_named(defect: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, words = PLANTED[defect]
    monkeypatch.setattr(ops, "linear", wrong)
    code, out = run(capsys)
    expected = {name for name in re.findall(r"^  (\S.*?) \.+ ", out, flags=re.MULTILINE) if words in name}
    assert (code, failed(out)) == (1, expected)
    assert set(re.findall(r"^FAILED: cpu: (.*)$", out, flags=re.MULTILINE)) == expected
    assert len(re.findall(r"^      .*: got \S+, allowed \S+$", out, flags=re.MULTILINE)) >= len(expected)


@pytest.mark.usefixtures("only_ops")
def test_a_check_that_raises_has_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ImportError("undefined symbol: aoti_torch_x\nin the second line")

    with monkeypatch.context() as patch:
        patch.setattr(ops, "quantize", broken)
        code, out = run(capsys)
        assert (code, len(failed(out))) == (1, 4 * len(ops.formats.FORMATS))  # those of a dense weight run
    monkeypatch.setattr(selftest, "_import_ops", broken)
    code, out = run(capsys)
    assert (code, "0 of 1 checks passed" in out) == (1, True)
    assert "      ImportError in broken (test_cli_selftest.py, line " in out
    assert "undefined symbol: aoti_torch_x\n      in the second line\n" in out


def not_at_zero(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data += 0.01 * parameter.requires_grad


def without_principal_part(model: nn.Module) -> None:
    for layer in pissa_layers(model.base_model.model).values():
        layer.base.module.start.b0.zero_()


def without_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)


@pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")
@pytest.mark.parametrize(
    ("form", "alter", "words"),
    [
        ("implicit", not_at_zero, "with and without the adapter"),
        ("int8", without_principal_part, "from the given model's"),
        ("nf4", without_gradients, "loss of the eighth step"),
    ],
)
def test_a_wrong_model_is_found(form: str, alter: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap = pissa.wrap

    def wrong(*args: Any, **kwargs: Any) -> nn.Module:
        model = wrap(*args, **kwargs)
        alter(model)
        return model

    monkeypatch.setattr(pissa, "wrap", wrong, raising=False)
    assert any(words in text for text in wrong_in_model(form, CPU))


@pytest.mark.parametrize(
    ("reader", "words"),
    [(pissa.PissaModel, "the loaded model's logits"), (peft.PeftModel, "PEFT's LoRA of the same files")],
)
def test_a_wrong_save_is_found(reader: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = reader.from_pretrained.__func__

    def forgetful(cls: Any, *args: Any, **kwargs: Any) -> nn.Module:
        model = load(cls, *args, **kwargs)
        next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).data.zero_()
        return model

    monkeypatch.setattr(reader, "from_pretrained", classmethod(forgetful))
    assert [words in text for text in wrong_in_model("implicit", CPU)] == [True]


def test_a_pipe_that_ends_ends_the_command() -> None:
    """As in `pissa env | head -1`."""
    program = "import sys; from pissa.cli import main; sys.exit(main())"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program, "env"], **pipes) as run:
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 141
