"""LoRA folders as the tests of conversion look at them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pissa
from language_models import Make, train
from pissa.adapters.lora_folder import open_adapter
from pissa.conversion import Conversion

# float32, two layers: the products are summed in another order
CLOSE = 1e-5

NAMES = ["adapter_config.json", "adapter_model.safetensors"]
PATTERNS = {
    "lora_alpha": 6,
    "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5},
    "alpha_pattern": {"v_proj": 3, "layers.1.mlp.up_proj": 8},
}


def train_ours(make: Make, tokens: Tensor, folder: Path, **fields: object) -> pissa.PissaModel:
    """Trains an adapter of ours a little, saves it to the folder, and returns the model, in evaluation mode."""
    model = pissa.wrap(make(), r=4, **fields)
    train(model, tokens)
    model.save_pretrained(folder)
    return model.eval()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text())


def changes(folder: Path) -> dict[str, Tensor]:
    """The change s B A of each weight in a LoRA folder, in float64; of experts the one after the other."""
    lora = open_adapter(folder)
    return {
        name: factors.scaling * torch.stack([b @ a for a, b in lora.matrices(name)])
        for name, factors in lora.factors.items()
    }


def check_difference(lora: Path, adapter: Path, initial: Path) -> None:
    """The change in the first folder is that of the second less that of the third, but for one rounding to float32 of
    each element of its factors."""
    written, (trained, start) = open_adapter(lora), map(changes, (adapter, initial))
    assert written.factors.keys() == trained.keys() == start.keys()
    for name, found in changes(lora).items():
        factors = written.matrices(name)
        size = written.factors[name].scaling * torch.stack([b.abs() @ a.abs() for a, b in factors])
        assert ((found - (trained[name] - start[name])).abs() <= 2.01 * 2.0**-24 * size).all(), name


def check_best(source: Path, target: Path, done: Conversion, rank: int) -> None:
    """What was left out is the energy of the singular values behind the rank, which dense decompositions find."""
    before, after = changes(source), changes(target)
    assert before.keys() == after.keys() == done.ranks.keys()
    energies, lost = 0.0, 0.0
    for name, (_, written) in done.ranks.items():
        values = torch.linalg.svdvals(before[name])
        energy, rest = values.square().sum().item(), values[..., rank:].square().sum().item()
        # The factors were rounded to float32.
        assert (before[name] - after[name]).norm().item() == pytest.approx(rest**0.5, rel=1e-6, abs=1e-6 * energy**0.5)
        assert written <= rank
        energies, lost = energies + energy, lost + rest
    assert done.kept == pytest.approx(1 - lost / energies, rel=1e-10)
