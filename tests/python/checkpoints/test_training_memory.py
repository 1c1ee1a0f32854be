"""The memory of training: stored tensors to the byte, what a forward keeps within a stated factor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import pissa
from bench.compare.models import quantised_bytes
from pissa.checkpoints.training_memory import training_memory
from pissa.config import Form
from pissa.layers.layer import pissa_layers

FORMS = {
    "implicit": ({}, Form("implicit")),
    "nf4": ({"quant": "nf4"}, Form.quantised("nf4", True)),
    "nf4, float32 scales": ({"quant": "nf4", "double_quant": False}, Form.quantised("nf4", False)),
    "int8": ({"quant": "int8"}, Form.quantised("int8", True)),
}
BATCH, LENGTH = 2, 24


def predicted(model: nn.Module, form: Form) -> dict[str, int]:
    layers = pissa_layers(model.base_model.model, "default")
    config = model.base_model.model.config
    rest = (config.vocab_size * config.hidden_size * 2 + (2 * config.num_hidden_layers + 1) * config.hidden_size) * 2
    shapes = {name: layer.matrix_shape for name, layer in layers.items()}
    dense = form.name == "implicit"
    return training_memory(
        shapes,
        4,
        weights=rest
        + sum(2 * math.prod(shape) if dense else quantised_bytes(shape, form) for shape in shapes.values()),
        dtype=torch.bfloat16,
        hidden=config.hidden_size,
        tokens=BATCH * LENGTH,
    )["plain"]


def nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in {t.data_ptr(): t for t in tensors}.values())


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", FORMS)
def test_stored_tensors(name: str, tiny_llama: Callable[..., nn.Module]) -> None:
    options, form = FORMS[name]
    model: Any = pissa.wrap(tiny_llama(dtype=torch.bfloat16), r=4, **options)
    found = predicted(model, form)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found["trained"] == found["gradients"] == nbytes(trained)
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert found["optimizer"] == nbytes(moments)
    starts = [layer.start_of("default") for layer in pissa_layers(model.base_model.model, "default").values()]
    factors = [factor for start in starts for factor in (start.a0, start.b0)]
    assert found["start"] == nbytes(factors)
    kept = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    kept += [buffer for name, buffer in model.named_buffers() if "rotary" not in name]
    assert found["weights"] == nbytes(kept) - nbytes(factors)


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["implicit", "nf4"])
def test_what_a_forward_keeps(name: str, tiny_llama: Callable[..., nn.Module]) -> None:
    """Within a factor of 1.5 of what autograd saves."""
    options, form = FORMS[name]
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4}
    model: Any = pissa.wrap(tiny_llama(dtype=torch.bfloat16, **sizes), r=4, **options).train()
    known = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known and any(size in (LENGTH, BATCH * LENGTH) for size in tensor.shape):
            kept[tensor.data_ptr()] = tensor
        return tensor

    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=tokens).logits.sum()
    found = predicted(model, form)["activations"]
    saved = nbytes(list(kept.values()))
    assert saved / 1.5 < found < saved * 1.5


def test_formula() -> None:
    layers = {"h.0.q": (6, 4), "h.0.v": (3, 4), "h.1.q": (6, 4)}
    sizes: dict[str, Any] = {"weights": 1000, "dtype": torch.bfloat16, "hidden": 4, "tokens": 15}
    parameters = 2 * (10 + 7 + 10)
    found = training_memory(layers, 2, **sizes)
    plain, less = found["plain"], found["checkpointing"]
    total = plain.pop("total")
    assert plain == {
        "weights": 1000,
        "start": 4 * parameters,
        "trained": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
        "activations": 15 * 27 * 2,
    }
    assert total == sum(plain.values())
    assert less["activations"] == 15 * (2 * 4 * 2 + 17 * 2)
    of_a_small_side = training_memory(layers, 4, **sizes)["plain"]
    assert of_a_small_side["trained"] == 4 * (4 * 10 + 3 * 7 + 4 * 10)
