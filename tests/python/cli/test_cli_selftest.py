"""`pissa selftest`: passes where all is right, and names what is wrong, whatever that is."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
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
from pissa.cli.findings import Finding, close, same
from pissa.cli.model_checks import model_checks
from pissa.cli.op_checks import op_checks
from pissa.layers.layer import pissa_layers

CPU = torch.device("cpu")


@pytest.fixture
def only_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the models out, which take seconds."""
    monkeypatch.setattr(selftest, "_is_installed", lambda package: False)


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
    (tmp_path / "temporary").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    threads = torch.get_num_threads()
    code, out = run(capsys, "--device", "cpu")
    assert (code, failed(out)) == (0, set())
    count = len(re.findall(r" \.+ ok ", out))
    assert count == 2 + len(op_checks(CPU)) + len(model_checks(CPU))
    assert f"{count} of {count} checks passed" in out
    assert "`pissa env`" in out.splitlines()[-2]
    assert max(map(len, out.splitlines()[1:])) < 80
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "temporary"]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("device", [CPU, DEVICE])
def test_every_format_and_device_is_checked(device: torch.device) -> None:
    checks = op_checks(device)
    for format in ops.formats.FORMATS:
        assert sum(format in name for name in checks) >= 5
        assert any(name.startswith(f"{format}: ") for name in model_checks(device))
    assert any("threads" in name for name in checks) == (device == CPU)


@pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")
def test_the_gpu_s_stand_in_is_right() -> None:
    with CudaStandIn():
        wrong = {name: found for name, check in op_checks(DEVICE).items() if (found := wrong_of(check))}
        wrong |= {name: found for name, check in model_checks(DEVICE).items() if "nf4: " in name and wrong_of(check)}
    assert wrong == {}


def wrong_of(check: Callable[[], Any]) -> list[str]:
    return [str(finding) for finding in check() if not finding.passed]


# ---- Planted defects of ops ------------------------------------------------------------------------------------------

LINEAR, DEQUANTIZE, SPLIT, SVD, ADD = ops.linear, ops.dequantize, ops.split, ops.svd_lowrank, ops.add_low_rank


def of_int8(weight: Any) -> bool:
    return isinstance(weight, ops.QuantizedWeight) and weight.format == "int8"


def half_gradient(x: Any, weight: Any, *args: Any, a: Any, **kwargs: Any) -> Any:
    """Right but for the gradient of a."""
    return LINEAR(x, weight, *args, a=a.detach() + (a - a.detach()) / 2, **kwargs)


def long_factor(*args: Any, **kwargs: Any) -> ops.Split:
    split = SPLIT(*args, **kwargs)
    return split._replace(a0=split.a0 * 1.0001)


PLANTED: dict[str, tuple[str, Callable[..., Any], str]] = {
    "output": ("linear", lambda x, w, *args, **kw: LINEAR(x, w, *args, **kw) * (1.5 if of_int8(w) else 1), "int8 w"),
    "few rows": ("linear", lambda x, *args, **kw: LINEAR(x, *args, **kw) * (1.5 if len(x) < 16 else 1), "linear"),
    "NaN": ("linear", lambda *args, **kw: LINEAR(*args, **kw) * torch.nan, "linear, threads"),
    "gradient": ("linear", half_gradient, "linear"),
    "change": ("add_low_rank", lambda y, *args, **kw: ADD(y, *args, **kw) + y, "add_low_rank"),
    "levels": ("dequantize", lambda w, *args: DEQUANTIZE(w, *args) * (1 + 1e-5), "dequantize, residual in"),
    "SVD": ("svd_lowrank", lambda w, r: SVD(w, r, passes=2), "svd_lowrank"),
    "factors": ("split", long_factor, "split"),
    "threads": ("split", lambda *args, **kw: SPLIT(*args, **kw, seed=torch.get_num_threads()), "threads"),
}


@pytest.mark.usefixtures("only_ops")
@pytest.mark.parametrize("defect", PLANTED)
def test_a_wrong_op_is_named(defect: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name, wrong, words = PLANTED[defect]
    monkeypatch.setattr(ops, name, wrong)
    code, out = run(capsys)
    # Where scales are quantised, small errors of the rest are not seen.
    checks = [check for check in op_checks(CPU) if "double_quant" not in check]
    expected = {check for check in checks if any(word in check for word in words.split(", "))}
    assert (code, failed(out)) == (1, expected)
    assert set(re.findall(r"^FAILED: Ops on cpu: (.*)$", out, flags=re.MULTILINE)) == expected
    assert len(re.findall(r"^      .*: got \S+, allowed \S+$", out, flags=re.MULTILINE)) >= len(expected)


@pytest.mark.usefixtures("only_ops")
def test_a_check_that_raises_has_failed_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such instruction\nin the second line")

    monkeypatch.setattr(ops, "svd_lowrank", broken)
    code, out = run(capsys)
    assert (code, failed(out)) == (1, {"svd_lowrank, float32", "svd_lowrank, bfloat16"})
    assert "      RuntimeError in broken (test_cli_selftest.py, line " in out
    assert "no such instruction\n      in the second line\n" in out
    assert "Traceback" not in out
    count = 1 + len(op_checks(CPU))
    assert f"{count - 2} of {count} checks passed" in out


# ---- What cannot be imported or used ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("_import_ops", 1), ("_import_models", 2 + len(op_checks(CPU)))])
def test_what_does_not_import_has_failed(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ImportError("undefined symbol: aoti_torch_x")

    monkeypatch.setattr(selftest, name, broken)
    code, out = run(capsys)
    assert code == 1
    assert "ImportError in broken" in out
    assert "undefined symbol: aoti_torch_x" in out
    assert f"{count - 1} of {count} checks passed" in out


@pytest.mark.usefixtures("only_ops")
def test_without_peft_the_ops_are_tested(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys)
    assert code == 0
    assert 'Models were not tested: PEFT is not installed; run `pip install "pissa[cli]"`' in out


@pytest.mark.usefixtures("only_ops")
def test_a_gpu_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out = run(capsys, "--device", "cuda")
    assert (code, "--device cuda: torch finds no GPU here" in out) == (2, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("pissa.ops._load.cuda_problem", "torch is built for CUDA 12.8")
    code, out = run(capsys)
    assert (code, "\nThe GPU was not tested: torch is built for CUDA 12.8\n" in out) == (0, True)
    code, out = run(capsys, "--device", "cuda")
    assert (code, "--device cuda: torch is built for CUDA 12.8" in out) == (2, True)
    code, out = run(capsys, "--device", "cpu")
    assert (code, "GPU" in out) == (0, False)


@pytest.mark.usefixtures("only_ops")
def test_a_gpu_is_tested_after_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    with CudaStandIn():
        code, out = run(capsys)
    assert code == 0
    assert out.index("\nOps on cpu: ") < out.index("\nOps on cuda: ") < out.index(", some GPU\n")


# ---- Planted defects of models ---------------------------------------------------------------------------------------


def altered(alter: Callable[[nn.Module], None]) -> Callable[..., nn.Module]:
    """pissa.wrap, and something that goes wrong with its model."""
    wrap = pissa.wrap

    def wrapped(*args: Any, **kwargs: Any) -> nn.Module:
        model = wrap(*args, **kwargs)
        alter(model)
        return model

    return wrapped


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def not_at_zero(model: nn.Module) -> None:
    for parameter in parameters(model):
        parameter.data += 0.01


def without_principal_part(model: nn.Module) -> None:
    for layer in pissa_layers(model.base_model.model).values():
        layer.base.module.start.b0.zero_()


def without_gradients(model: nn.Module) -> None:
    for parameter in parameters(model):
        parameter.register_hook(torch.zeros_like)


def with_a_base_that_trains(model: nn.Module) -> None:
    weight = model.base_model.model.model.norm.weight

    def train(model: nn.Module, args: object) -> None:
        weight.data += 0.01 * model.training

    model.register_forward_pre_hook(train)


def with_other_merged_weights(model: nn.Module) -> None:
    merge = model.merge_adapter

    def wrong() -> None:
        merge()
        for layer in pissa_layers(model.base_model.model).values():
            layer.base_layer.weight.data *= 1.01

    model.merge_adapter = wrong


def with_unloaded_adapter(model: nn.Module) -> None:
    model.unload = model.merge_and_unload


MODELS: dict[str, tuple[str, Callable[[nn.Module], None], str]] = {
    "a start that is not 0": ("explicit: starts as its base", not_at_zero, "with and without the adapter"),
    "no principal part": ("nf4: starts as its base", without_principal_part, "the wrapped model and the given one"),
    "no gradients": ("implicit: learns", without_gradients, "loss of the last step"),
    "a base that trains": ("int8: learns", with_a_base_that_trains, "the base before and after"),
    "a wrong merged weight": ("nf4: is merged and unloaded", with_other_merged_weights, "before and after merging"),
    "a merged base": ("implicit: is merged and unloaded", with_unloaded_adapter, "the base and the unloaded model"),
}


@pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")
@pytest.mark.parametrize("defect", MODELS)
def test_a_wrong_model_is_found(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, alter, words = MODELS[defect]
    monkeypatch.setattr(pissa, "wrap", altered(alter), raising=False)
    assert any(words in text for text in wrong_of(model_checks(CPU)[name]))


@pytest.mark.parametrize(
    ("reader", "words"),
    [(pissa.PissaModel, "the saved and the loaded model"), (peft.PeftModel, "PEFT's LoRA of the same files")],
)
def test_a_wrong_reload_is_found(reader: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = reader.from_pretrained.__func__

    def forgetful(cls: Any, *args: Any, **kwargs: Any) -> nn.Module:
        model = load(cls, *args, **kwargs)
        next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).data.zero_()
        return model

    monkeypatch.setattr(reader, "from_pretrained", classmethod(forgetful))
    found = wrong_of(model_checks(CPU)["implicit: comes back from disk"])
    assert [words in text for text in found] == [True]


# ---- Findings --------------------------------------------------------------------------------------------------------


def test_findings() -> None:
    exact = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    bound = torch.tensor([1e-3, 1e-6, 1e-3], dtype=torch.float64)
    assert close("y", exact.float(), exact, bound).passed
    finding = close("y", (exact + torch.tensor([5e-4, 4e-6, 0.0])).float(), exact, bound)
    assert (finding.passed, finding.got) == (False, pytest.approx(4e-6, rel=0.1))
    assert not close("y", torch.tensor([1.0, torch.nan, 4.0]), exact, bound).passed
    assert str(Finding("y", 1.23456, 1.0)) == "y: got 1.23, allowed 1"
    assert same("y", exact, exact).passed
    assert same("y", exact, exact + bound).got == 3
    assert not same("y", exact * torch.nan, exact * torch.nan).passed
