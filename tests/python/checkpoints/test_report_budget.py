"""Ranks for a budget, beside every other choice of ranks; patterns, as PEFT reads them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from peft.utils.other import get_pattern_key
from torch import nn

import pissa
from pissa.checkpoints.budget import Candidate, allocate, as_pattern, kinds_of
from pissa.checkpoints.spectra import LayerReport, layer_report, suggest
from pissa.layers.layer import pissa_layers


def candidates(seed: int, costs: tuple[int, ...], ranks: int) -> list[Candidate]:
    """Layers with random gains that do not increase."""
    drawn = torch.rand(len(costs), ranks, generator=torch.Generator().manual_seed(seed)).double() ** 2
    gains = drawn.sort(dim=1, descending=True).values.tolist()
    return [Candidate(row[: ranks - i % 2], cost) for i, (row, cost) in enumerate(zip(gains, costs, strict=True))]


def best(layers: list[Candidate], budget: int, step: int) -> float:
    """The largest gain of all ranks that are steps, or all of a layer, within the budget."""
    choices = [
        [rank for rank in range(1, len(layer.gains) + 1) if rank % step == 0 or rank == len(layer.gains)]
        for layer in layers
    ]
    return max(gain(layers, ranks) for ranks in itertools.product(*choices) if spent(layers, ranks) <= budget)


def gain(layers: list[Candidate], ranks: tuple[int, ...] | list[int]) -> float:
    return sum(sum(layer.gains[:rank]) for layer, rank in zip(layers, ranks, strict=True))


def spent(layers: list[Candidate], ranks: tuple[int, ...] | list[int]) -> int:
    return sum(layer.cost * rank for layer, rank in zip(layers, ranks, strict=True))


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_layers_of_one_shape_get_the_best_ranks(seed: int, step: int) -> None:
    layers = candidates(seed, (7, 7, 7), 6)
    if step > 1:  # a last step that is shorter costs less
        layers = [layer._replace(gains=layer.gains[:4]) for layer in layers]
    for budget in range(7 * 3 * step, 7 * 19, 7 * step):
        ranks = allocate(layers, budget, step)
        assert spent(layers, ranks) <= budget
        assert gain(layers, ranks) == pytest.approx(best(layers, budget, step), rel=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_layers_of_other_shapes_lose_less_than_a_step(seed: int) -> None:
    layers = candidates(seed, (3, 8, 13), 6)
    found_exactly = 0
    for budget in range(24, 24 * 6, 7):
        ranks = allocate(layers, budget, 1)
        assert spent(layers, ranks) <= budget
        # Whatever does not fit at the end is one step of one layer.
        left = [layer.gains[rank] for layer, rank in zip(layers, ranks, strict=True) if rank < len(layer.gains)]
        lacking = best(layers, budget, 1) - gain(layers, ranks)
        assert lacking <= max(left, default=0) + 1e-12
        found_exactly += lacking < 1e-12
    assert found_exactly > 4


def test_steps_and_sides() -> None:
    layers = [Candidate([1.0] * 20, 10), Candidate([0.5] * 5, 10)]
    assert allocate(layers, 10**9) == [20, 5]
    assert allocate(layers, 130) == [8, 5]
    assert allocate(layers, 209) == [8, 5]
    assert allocate(layers, 210) == [16, 5]
    with pytest.raises(ValueError, match=r"budget: got 129 parameters; needed: at least 130, rank 8 in each layer"):
        allocate(layers, 129)


@pytest.mark.parametrize("seed", range(20))
def test_a_pattern_gives_every_layer_its_rank(seed: int) -> None:
    names = [f"model.layers.{i}.{kind}" for i in range(12) for kind in ("attn.q_proj", "attn.c_proj", "mlp.c_proj")]
    names += [f"model.layers.{i}.moe.experts.{e}.w1" for i in range(3) for e in range(4)]
    names += ["head", "model.merge", "model.layers.0.c_proj"]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, 4, (len(names),), generator=generator) * 8
    ranks = dict(zip(names, drawn.tolist(), strict=True))
    for name in names:  # one kind wholly alike, another but for one
        if name.endswith("w1"):
            ranks[name] = 64
        elif name.endswith("q_proj"):
            ranks[name] = 40 if ".3." in name else 48
    r, pattern = as_pattern(ranks)
    assert {name: pattern.get(get_pattern_key(list(pattern), name), r) for name in names} == ranks
    assert pattern["q_proj"] == 48
    assert pattern[r"^model\.layers\.3\.attn\.q_proj"] == 40


def test_experts_that_agree_share_a_key() -> None:
    ranks = {f"layers.{i}.experts.{e}.up": 8 if i in (1, 4) else 16 for i in range(6) for e in range(20)}
    assert as_pattern(ranks) == (16, {r"^layers\.(1|4)\.experts\.\d+\.up": 8})
    ranks["layers.2.experts.7.up"] = 24
    r, pattern = as_pattern(ranks)
    assert {name: pattern.get(get_pattern_key(list(pattern), name), r) for name in ranks} == ranks


def test_experts_of_a_module_get_one_rank() -> None:
    matrices = [
        (f"layers.{i}.experts.{e}.up", torch.randn(16, 24, generator=torch.Generator().manual_seed(i)) * 3.0 ** (i + e))
        for i in range(2)
        for e in range(2)
    ]
    layers = [layer_report(name, matrix, 12) for name, matrix in matrices]
    together = [[f"layers.{i}.experts.{e}.up" for e in range(2)] for i in range(2)]
    found = suggest(layers, 40 * 4 * 4, 2, together)
    ranks = [{found.ranks[name] for name in names} for names in together]
    assert [len(some) for some in ranks] == [1, 1]
    assert min(ranks[0]) < min(ranks[1])
    assert found.parameters == 40 * sum(found.ranks.values()) <= 640
    alone = suggest(layers, 40 * 4 * 4, 2)
    assert len({alone.ranks[name] for name in together[1]}) == 2
    assert alone.lost < found.lost


def test_equal_ranks_need_no_pattern() -> None:
    assert as_pattern({f"h.{i}.{kind}": 16 for i in range(3) for kind in ("q", "k")}) == (16, {})
    assert as_pattern({"h.0.q": 16, "h.1.q": 16, "h.0.k": 8, "h.1.k": 8}) == (16, {"k": 8})


def test_kinds() -> None:
    names = [f"h.{i}.{kind}" for i in range(5) for kind in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")]
    kinds = kinds_of([*names, "lm_head", "x.1.experts.0.w1"])
    assert list(kinds) == ["attn.c_proj", "mlp.c_proj", "c_fc", "lm_head", "w1"]
    assert kinds["mlp.c_proj"] == [name for name in names if name.endswith("mlp.c_proj")]


@pytest.fixture
def model(tiny_llama: Callable[..., nn.Module]) -> nn.Module:
    """A model whose layers differ in how fast their spectra fall."""
    model = tiny_llama()
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "proj" in name:
            u, s, vh = torch.linalg.svd(parameter.detach(), full_matrices=False)
            parameter.data = (u * torch.arange(1, len(s) + 1) ** (-0.1 - number % 4 / 2)) @ vh
    return model


def reports(model: nn.Module) -> list[LayerReport]:
    matrices = {name: m.weight.detach() for name, m in model.named_modules() if name.endswith("_proj")}
    return [layer_report(name, matrix, 24) for name, matrix in matrices.items()]


def test_a_suggestion_can_be_pasted(model: nn.Module) -> None:
    layers = reports(model)
    budget = sum(4 * sum(layer.shape) for layer in layers)
    found = suggest(layers, budget, step=2)
    assert (found.uniform["r"], found.uniform["parameters"]) == (4, budget)
    assert found.parameters <= budget
    assert found.lost < found.uniform["lost"]
    assert len(set(found.ranks.values())) > 1
    wrapped = pissa.wrap(model, r=found.r, rank_pattern=found.rank_pattern)
    adapters = pissa_layers(wrapped.base_model.model, "default")
    assert {name: layer.r["default"] for name, layer in adapters.items()} == found.ranks
    assert {layer.scaling["default"] for layer in adapters.values()} == {1.0}
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert trained == found.parameters


def test_one_rank_for_all_is_suggested_where_a_large_step_does_not_fit() -> None:
    """A single layer with the best gain for each parameter, after which the 8 others, together, find no room."""
    drawn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    matrices = [("alone", 1.01 * drawn), *((f"experts.{i}.up", drawn) for i in range(8))]
    layers = [layer_report(name, matrix, 8) for name, matrix in matrices]
    together = [["alone"], [f"experts.{i}.up" for i in range(8)]]
    found = suggest(layers, 16 * 2 * 9, 1, together)
    assert (found.uniform["r"], set(found.ranks.values())) == (2, {2})
    assert found.lost == found.uniform["lost"]
