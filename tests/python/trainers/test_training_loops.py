"""Training loops without a trainer: plain PyTorch, under autocast, checkpointing and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pissa
from daily import each
from language_models import Make, train
from trainers import FORMS, TERMS, assert_equal, compiles, forms, quiet, state, trainable, unchanged

pytestmark = quiet


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Of the loss on a batch, for what is trained."""
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: model.get_parameter(name).grad.clone() for name in trainable(model)}


@forms
def test_autocast(form: str, tiny_llama: Make) -> None:
    """bfloat16 products, float32 parameters and gradients; and it still starts at the base."""
    ids = torch.randint(0, 97, (16, 9), generator=torch.Generator().manual_seed(2))

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def loss_of(model: nn.Module) -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    model = pissa.wrap(tiny_llama(), r=4, **FORMS[form]).eval()
    if form == "implicit":
        assert loss_of(tiny_llama()).item() == loss_of(model).item()
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    with unchanged(model):
        for _ in range(4):
            loss = loss_of(model)
            loss.backward()
            assert {model.get_parameter(name).grad.dtype for name in trainable(model)} == {torch.float32}
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    with torch.no_grad(), model.disable_adapter():
        assert loss_of(model).item() == losses[0]


@forms
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("before", each([False, True], [False]), ids=["after wrapping", "before wrapping"])
def test_gradient_checkpointing_changes_no_bit(
    form: str, reentrant: bool, before: bool, tiny_llama: Make, tokens: Tensor
) -> None:
    plain = pissa.wrap(tiny_llama(), r=4, **FORMS[form]).train()
    train(plain, tokens)
    base = tiny_llama()
    if before:  # PEFT then enables the gradients of the inputs itself
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = pissa.wrap(base, r=4, **FORMS[form]).train()
    if not before:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.get_base_model().model.layers[0].mlp.up_proj.register_forward_hook(count)
    train(model, tokens)
    assert calls == 3 + 6  # the head is tried; and three steps, each with a second forward
    assert_equal(state(model), state(plain))
    assert_equal(gradients(model, tokens), gradients(plain, tokens))


KINDS: dict[str, dict[str, Any]] = {**FORMS, "dora": {"use_dora": True}}


@compiles
@pytest.mark.parametrize("kind", each(KINDS, ["nf4"]))
def test_the_whole_model_compiles_to_one_graph(kind: str, tiny_llama: Make, tokens: Tensor) -> None:
    tolerance = TERMS * 2**-24
    models = [pissa.wrap(tiny_llama(num_hidden_layers=1), r=4, **KINDS[kind]).train() for _ in range(2)]
    for model in models:  # away from the start, where the change is zero
        train(model, tokens)
    models[1].compile(backend="aot_eager", fullgraph=True)
    losses = [model(input_ids=tokens, labels=tokens).loss.item() for model in models]
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    eager, compiled = (gradients(model, tokens) for model in models)
    for name, gradient in eager.items():
        assert (compiled[name] - gradient).norm() <= tolerance * gradient.norm()
