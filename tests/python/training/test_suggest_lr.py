"""suggest_lr: the rate of trial trainings, on functions whose answer is known, and a model left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import pissa


class Point(nn.Module):
    """A point that is trained."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(values))


def language_model(**fields: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, attention_dropout=fields.pop("dropout", 0.0)))
    return pissa.wrap(model, r=4, **fields)


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(8, (2, 8), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


@pytest.mark.parametrize("best", [3.7e-3, 0.042, 160.0])
def test_the_vertex_is_found_exactly(best: float) -> None:
    """One step of Adam along a slope of 1 moves by the rate; what it leaves is a parabola over the rate's logarithm."""

    def loss(model: nn.Module, batch: str) -> Tensor:
        return model.at.sum() + 1 if batch == "seen" else (torch.log(-model.at.sum()) - math.log(best)) ** 2

    found = pissa.suggest_lr(Point(0.0), ["seen", "unseen"], loss=loss)
    assert found.rate == best
    least = min(found.losses, key=lambda rate: found.losses[rate])
    assert abs(math.log2(least / best)) <= 0.5 + 1e-6
    assert {least / 2, 2 * least} <= found.losses.keys()


def test_the_first_rate_is_the_best_step_along_the_sign_on_a_parabola_that_ends_at_0() -> None:
    def loss(model: nn.Module, batch: object) -> Tensor:
        return 3 * (model.at.sum() - 7) ** 2

    found = pissa.suggest_lr(Point(1.0, 2.0), ["a", "b"], loss=loss)  # at the sum of 3, which two steps of 2 take to 7
    # Half and twice of it leave 1/4 and 1 of the loss of 48, so that the parabola's vertex is at 2^-0.3 of it.
    assert list(found.losses) == pytest.approx([2, 1, 4])
    assert list(found.losses.values()) == pytest.approx([0, 12, 48], abs=1e-4)
    assert found.rate == pytest.approx(2 * 2**-0.3, rel=0.02)


@pytest.mark.parametrize("init", ["pissa", "lora"])
def test_no_rate_of_a_fine_sweep_is_much_better(init: str) -> None:
    """Trials again, at the suggestion and beside it, by a loop that knows nothing of suggest_lr."""
    data = batches(8)
    found = pissa.suggest_lr(language_model(init=init), data)

    def left(rate: float) -> float:
        model = language_model(init=init)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(parameters)
        for step, batch in enumerate(data[:4]):
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / 4)) / 2
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return sum(model(**batch).loss.item() for batch in data[4:]) / 4

    for rate, loss in found.losses.items():
        assert left(rate) == pytest.approx(loss, rel=1e-5)
    sweep = [left(found.rate * 2 ** (step / 4)) for step in range(-8, 9)]
    assert left(found.rate) <= 1.02 * min(sweep)


class Noisy(nn.Module):
    """All that a pass in training mode may change: a generator's state and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.layers[0].weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x) - 3).square().mean()


def own(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch)
    return loss


def failing_at(call: int) -> Callable[[nn.Module, Tensor], Tensor]:
    calls = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(batch)
        if len(calls) == call:
            raise RuntimeError("out of memory")
        return own(model, batch)

    return loss


@pytest.mark.parametrize("call", [None, 1, 5])
def test_the_model_is_left_as_it_was(call: int | None) -> None:
    model = Noisy()
    model.layers[1].eval()  # a mixture of modes
    bias = model.layers[0].bias
    bias.grad = gradient = torch.randn(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    kept, state = gradient.clone(), torch.get_rng_state()
    data = [torch.randn(6, 4, generator=torch.Generator().manual_seed(0))] * 6
    if call is None:
        pissa.suggest_lr(model, data, loss=own)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            pissa.suggest_lr(model, data, loss=failing_at(call))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert bias.grad is gradient
    assert torch.equal(gradient, kept)
    assert model.layers[3].weight.grad is None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_it_trains_in_training_mode_and_judges_in_evaluation_mode() -> None:
    seen = []

    def loss(model: nn.Module, batch: str) -> Tensor:
        seen.append((batch, model.training))
        return (model.at.sum() - 1) ** 2

    pissa.suggest_lr(Point(0.0), ["a", "b", "c", "d", "e"], loss=loss)
    trial = [("a", True), ("b", True), ("c", False), ("d", False), ("e", False)]
    assert seen[0] == ("a", True)
    assert seen[1:] == trial * (len(seen) // 5)


def test_the_same_input_gives_the_same_rate() -> None:
    model = language_model(dropout=0.2)
    first = pissa.suggest_lr(model, batches())
    torch.rand(3)
    assert pissa.suggest_lr(model, iter(batches())) == first


def test_the_text_says_what_was_found_and_why() -> None:
    found = pissa.suggest_lr(language_model(), batches(5))
    assert found.text.startswith(f"learning rate {found.rate:.1e}: {len(found.losses)} trial trainings of 2 ")
    assert found.text.endswith(" on 3 other batches")
    for rate, loss in found.losses.items():
        assert f"{loss:.3f} at {rate:.1e}" in found.text
    assert "\n" not in found.text


def test_a_rate_that_diverges_is_too_large() -> None:
    def loss(model: nn.Module, batch: str) -> Tensor:
        moved = model.at.sum().abs()
        if batch == "unseen" and moved > 0.3:
            return moved * math.inf
        return 1 - model.at.sum() if batch == "seen" else 1 - moved

    found = pissa.suggest_lr(Point(0.0), ["seen", "unseen"], loss=loss)  # 2, 1, 0.5, 0.25, 0.125
    assert found.rate == 0.25
    assert found.losses[0.5] == math.inf
    assert "no number at 5.0e-01" in found.text


def test_a_smaller_rate_that_diverges_leaves_the_best_one() -> None:
    """No parabola goes through its loss."""

    def loss(model: nn.Module, batch: str) -> Tensor:
        moved = model.at.sum().abs()
        if batch == "unseen" and moved < 1.5:
            return moved * math.inf
        return 1 - model.at.sum() if batch == "seen" else 1 + moved

    found = pissa.suggest_lr(Point(0.0), ["seen", "unseen"], loss=loss)
    assert found.losses[1.0] == math.inf
    assert found.rate == 2.0


def constant(model: nn.Module, batch: object) -> Tensor:
    return torch.tensor(1.0)


def infinite(model: nn.Module, batch: object) -> Tensor:
    return model.at.sum() / 0


def flat(model: nn.Module, batch: object) -> Tensor:
    return model.at.sum() * 0 + 1


def falling(model: nn.Module, batch: object) -> Tensor:
    return model.at.sum()


@pytest.mark.parametrize(
    ("data", "loss", "message"),
    [
        ([], falling, "batches: got 0; needed: at least 2"),
        (["a"], falling, "batches: got 1; needed: at least 2"),
        (["a", "b"], infinite, "loss of the first batch is nan before training"),
        (["a", "b"], constant, "does not depend on what is trained"),
        (["a", "b"], flat, r"gradient of the first batch has norm 0\.0"),
        (["a", "b"], falling, r"no rate from .* to .* is better than half and twice of it"),
        ([torch.ones(1)] * 2, None, "batches: got one of type Tensor; allowed: mappings"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(data: list[Any], loss: Any, message: str) -> None:
    model = Point(0.0)
    with pytest.raises(TypeError if loss is None else ValueError, match=message):
        pissa.suggest_lr(model, data, loss=loss)
    assert model.at.item() == 0.0
    assert model.at.grad is None


def test_batches_without_labels_and_models_without_training_are_refused() -> None:
    model = language_model()
    unlabelled = [{"input_ids": batch["input_ids"]} for batch in batches()]
    with pytest.raises(ValueError, match="the model gives no loss for the first batch; give batches with labels"):
        pissa.suggest_lr(model, unlabelled)
    with pytest.raises(ValueError, match="nothing is trained: no parameter of the model has requires_grad"):
        pissa.suggest_lr(model.requires_grad_(False), batches())
