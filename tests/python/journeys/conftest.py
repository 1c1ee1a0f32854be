"""What the journeys start from; none of it is to be changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hub_cache import HubCache
from runs import save_sums
from tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small model with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with their answers."""
    return save_sums(tmp_path_factory.mktemp("data"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubCache:
    """An empty cache of the Hub."""
    return HubCache(tmp_path / "hub", monkeypatch)
