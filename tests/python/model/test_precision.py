"""PissaModel.precision: training in products of integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pissa
from architectures import ARCHITECTURES
from pissa import notices, ops

needs_int8 = pytest.mark.skipif(not ops.build_info()["int8"], reason="this processor multiplies no bytes")
pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")]

BATCH = torch.arange(40).view(2, 20) % 29


def wrapped(precision: str = "int8", **options: Any) -> Any:
    options = {"r": 4, "quant": "nf4", "task_type": "CAUSAL_LM", "fuse": False} | options
    return pissa.wrap(ARCHITECTURES["llama3"].make(), precision=precision, **options).train()


def logits(model: Any) -> Tensor:
    found: Tensor = model(BATCH).logits
    return found


@needs_int8
def test_training_mode_alone_computes_in_integers() -> None:
    model, floats = wrapped(), wrapped("float")
    assert (model.precision, floats.precision) == ("int8", "float")
    found, exact = logits(model).detach(), logits(floats).detach()
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.1
    assert torch.equal(logits(model.eval()), logits(floats.eval()))
    model.train().precision = "float"
    assert torch.equal(logits(model), exact)


@needs_int8
def test_what_is_saved_does_not_know_it(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path / "int8")
    wrapped("float").save_pretrained(tmp_path / "float")
    files = sorted(path.name for path in (tmp_path / "float").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "int8").iterdir())
    for name in files:
        assert (tmp_path / "int8" / name).read_bytes() == (tmp_path / "float" / name).read_bytes(), name


@needs_int8
def test_gradients_point_the_same_way_with_and_without_checkpoints() -> None:
    def of(model: Any) -> list[Tensor]:
        model(BATCH, labels=BATCH).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None and p.grad.any()]

    recomputed = wrapped()
    recomputed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found, again, exact = of(wrapped()), of(recomputed), of(wrapped("float"))
    assert len(found) == len(exact) > 0
    for one, same, other in zip(found, again, exact, strict=True):
        assert torch.equal(one, same)
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.97


@needs_int8
def test_another_adapter_computes_so_too() -> None:
    model = wrapped()
    model.add_adapter("second", pissa.PissaConfig(r=2, quant="nf4", init="lora"))
    model.set_adapter("second")
    assert all(layer.int8 for layer in model.modules() if hasattr(layer, "int8"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision: got 'int4'; allowed: float, int8"),
        ({"quant": None}, "precision: got 'int8', which multiplies with codes"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped(**options)


def test_a_processor_without_such_products_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pissa.model.pissa_model.build_info", lambda: {"isa": "avx2", "int8": False})
    with pytest.warns(notices.PrecisionWarning, match="no effect: this processor's instruction set, avx2"):
        wrapped()
