"""Shared by the Python tests."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may depend on the network

import pytest
import torch

import devices


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests of ops, layers and models compute: cpu, cuda")


def pytest_configure(config: pytest.Config) -> None:
    try:
        devices.select(config.getoption("--device"))
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None
    # peft 0.21 asks transformers 5 for a property that it has renamed
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not devices.on_cpu():
        for item in items:
            if item.get_closest_marker("cpu_only"):
                item.add_marker(pytest.mark.skip(reason="about the CPU"))


@pytest.fixture
def tiny_llama() -> Callable[..., torch.nn.Module]:
    """Makes a random LlamaForCausalLM of two layers: the same one for the same seed, whatever ran before."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **config: object) -> torch.nn.Module:
        sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **config}))
        return devices.put(model.to(dtype)).eval()

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """A batch of token ids [3, 11] for `tiny_llama`."""
    return devices.put(torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1)))
