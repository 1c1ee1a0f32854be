"""What the tests of the adapter API do with a small language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from devices import fetch

Make = Callable[..., nn.Module]
"""The fixture `tiny_llama`."""

FORMS: dict[str, dict[str, str]] = {"implicit": {}, "explicit": {"residual": "explicit"}, "nf4": {"quant": "nf4"}}
"""Fields of PissaConfig for each way to keep the base."""

EVERY_FORM = {**FORMS, "int8": {"quant": "int8"}}
"""With the other quantised format: for what takes no time, and could depend on the format."""

TWO_FORMS = {form: FORMS[form] for form in ("implicit", "nf4")}
"""A base that stays as it is, and one in 4 bits: for what takes long."""


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of the model as it is, without a graph."""
    with torch.no_grad():
        return model(input_ids=tokens).logits


def moved(model: nn.Module) -> nn.Module:
    """The model, all that is trained in it moved away from its start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def train(model: nn.Module, tokens: Tensor, steps: int = 3) -> list[float]:
    """A few steps of AdamW on whatever is trainable; the losses."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def error(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to what was expected."""
    got, expected = (fetch(tensor.detach()).double() for tensor in (got, expected))
    return ((got - expected).norm() / expected.norm()).item()


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Two state dicts are the same to the bit."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name  # which torch.equal does not compare
        assert torch.equal(fetch(got[name]), fetch(tensor)), name


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that a failed call must leave alone."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()},
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "hooks": {name: list(module._forward_hooks) for name, module in model.named_modules()},
        "adapters": list(getattr(model, "peft_config", {})),
    }


def assert_same(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    values, old = after.pop("values"), before.pop("values")
    assert after == before
    for name, tensor in old.items():
        assert tensor.is_meta or torch.equal(values[name].nan_to_num(7), tensor.nan_to_num(7)), name
