"""Texts packed into one row, as TRL packs them, train as each does alone; a model that mixes them is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import pissa
from language_models import moved
from pissa import ops
from pissa.cli.verification import packing_check

Base = Callable[[], nn.Module]
TEXTS = [torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(count)) for count in (40, 7, 90, 3)]


def packed() -> dict[str, Any]:
    rows = [{"input_ids": text.tolist(), "labels": text.tolist()} for text in TEXTS]
    return dict(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows))


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("fuse", [True, False])
def test_loss_and_gradients_are_those_of_the_texts_alone(
    fuse: bool, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = moved(pissa.wrap(base(), r=4, fuse=fuse)).train()
    calls: list[int] = []
    attention = ops.attention
    monkeypatch.setattr(ops, "attention", lambda q, *args, **of: calls.append(q.shape[2]) or attention(q, *args, **of))
    loss = model(**packed(), use_cache=False).loss
    assert (sum(map(len, TEXTS)) in calls) == fuse
    learned = [len(text) - 1 for text in TEXTS]
    alone = [model(input_ids=text[None], labels=text[None], use_cache=False).loss for text in TEXTS]
    expected = sum(one * count for one, count in zip(alone, learned, strict=True)) / sum(learned)
    # Float32 sums of at most 128 terms in another order: 128 x 2^-24, in two layers and their gradients.
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
    for found, wanted in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-5 * float(wanted.abs().max()))


def test_a_model_that_mixes_texts_is_found(base: Base) -> None:
    model: Any = pissa.wrap(base(), r=4)
    assert packing_check(model, packed()) < 1e-5
    mask = torch.ones(1, sum(map(len, TEXTS)), dtype=torch.long)  # with which transformers looks for no texts
    assert packing_check(model, packed() | {"attention_mask": mask}) > 0.01
