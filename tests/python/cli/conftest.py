"""What the commands are tested on; none of it is to be changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import pissa
from language_models import train
from runs import save_sums
from tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small model."""
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a trained adapter."""
    model = pissa.wrap(AutoModelForCausalLM.from_pretrained(base), r=4)
    train(model, torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1)))
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with their answers."""
    return save_sums(tmp_path_factory.mktemp("data"))
