"""What `pissa.wrap` makes the host wait for on a GPU: a few times, however many layers there are, and for no weight
except those that it fingerprints because it replaces them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pissa
from cuda_stand_in import CudaStandIn
from daily import each
from language_models import Make
from pissa.base import remembered

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")]

WAITS = 14
"""The most of a wrap: two for each shape of weights, of which a Llama has four, to see that they are finite, and which
components are zero; one to see that their residuals will be finite, and one that they are."""

FORMS: dict[str, dict[str, Any]] = {
    "implicit": {},
    "explicit": {"residual": "explicit"},
    "nf4": {"quant": "nf4"},
    "nf4 with float32 scales": {"quant": "nf4", "double_quant": False},
    "int8": {"quant": "int8"},
    "as LoRA": {"init": "lora"},
    "DoRA": {"use_dora": True},
}


def wrapped(gpu: CudaStandIn, model: torch.nn.Module, **fields: Any) -> pissa.PissaModel:
    with gpu:
        model = gpu.put(model)
        gpu.forget()
        return pissa.wrap(model, r=4, **fields)


@pytest.fixture
def without_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads its tensor once, in pieces, as base/test_fingerprint shows."""
    monkeypatch.setattr(remembered, "fingerprint", lambda *tensors, dtype: "xxh3:float32:0")


@pytest.mark.usefixtures("without_fingerprints")
@pytest.mark.parametrize("form", each(FORMS, ["implicit", "nf4"]))
def test_the_host_waits_as_often_for_few_layers_as_for_many(form: str, tiny_llama: Make) -> None:
    waits = []
    for layers in (2, 9):
        gpu = CudaStandIn()
        wrapped(gpu, tiny_llama(num_hidden_layers=layers), **FORMS[form])
        waits.append((len(gpu.reads), len(gpu.sends)))
        assert gpu.waits() <= WAITS, [*gpu.reads, *gpu.sends]
        # Per weight at most the largest element; twice that and two norms of its residual; the mean of its scales.
        assert gpu.bytes_read() <= 8 * 8 * 7 * layers
    assert waits[0] == waits[1]


@pytest.mark.usefixtures("without_fingerprints")
def test_another_start_waits_for_no_weight_either(tiny_llama: Make) -> None:
    gpu, fields = CudaStandIn(), {"init": "lora", "repair": "pissa", "quant": "nf4"}
    wrapped(gpu, tiny_llama(), **fields)
    assert gpu.waits() <= 2 * WAITS
    more = CudaStandIn()
    wrapped(more, tiny_llama(num_hidden_layers=4), **fields)
    assert more.waits() == gpu.waits()


def test_saving_again_reads_no_base_weight(tiny_llama: Make, tmp_path: Path) -> None:
    for form in ("implicit", "explicit", "nf4", "int8"):
        gpu = CudaStandIn()
        model = wrapped(gpu, tiny_llama(), **FORMS[form])
        with gpu:
            model.save_pretrained(tmp_path / form)
            gpu.forget()
            model.save_pretrained(tmp_path / form)
        adapter = sum(path.stat().st_size for path in (tmp_path / form).glob("*.safetensors"))
        assert gpu.bytes_read() < 1.5 * adapter
