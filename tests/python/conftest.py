"""Shared by the Python tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may depend on the network

import pytest
import torch

import devices
import missing_calls
import unrun

HELP = f"where the tests of ops, layers and models compute: cpu, cuda, or {devices.STAND_IN}, which needs no GPU"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help=HELP)
    parser.addoption(
        "--without-system-calls",
        default="",
        help=f"calls of the system to take away, with commas, or all of them: {', '.join(missing_calls.CALLS)}",
    )


def taken_away(config: pytest.Config) -> tuple[str, ...]:
    """The calls that are taken away from this process."""
    asked = config.getoption("--without-system-calls")
    return missing_calls.CALLS if asked == "all" else tuple(filter(None, asked.split(",")))


def pytest_configure(config: pytest.Config) -> None:
    try:
        devices.select(config.getoption("--device"))
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None
    if unknown := set(taken_away(config)).difference(missing_calls.CALLS):
        raise pytest.UsageError(f"--without-system-calls: got {', '.join(unknown)}; allowed: {missing_calls.CALLS}")
    # Our own warnings only: what other packages deprecate of each other is not ours to mend.
    config.addinivalue_line("filterwarnings", "error::pissa.notices.PissaWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == devices.STAND_IN:
        unrun.mark(items, unrun.FAILS, unrun.ABORTS)
    if unrun.under_wine():
        unrun.mark(items, {}, unrun.ABORTS_UNDER_WINE)
    if not devices.on_cpu() or os.environ.get("PISSA_COMPOSITE") == "1":
        for item in items:
            if item.get_closest_marker("cpu_only"):
                item.add_marker(pytest.mark.skip(reason="about the CPU's kernels"))
    for item in items:
        needed = [call for mark in item.iter_markers("system_calls") for call in mark.args]
        if missing := set(needed).intersection({*taken_away(config), *missing_calls.LACKING}):
            item.add_marker(pytest.mark.skip(reason=f"about what {', '.join(sorted(missing))} gives"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Each test, its fixtures included, inside the stand-in and without system calls if that is asked for."""
    with ExitStack() as surroundings:
        if item.config.getoption("--device") == devices.STAND_IN:
            from cuda_stand_in import CudaStandIn  # imports pissa, which not every use of this file needs

            surroundings.enter_context(CudaStandIn())
        missing_calls.take_away(taken_away(item.config), surroundings.enter_context(pytest.MonkeyPatch.context()))
        return (yield)


def changes_of_the_tree() -> set[str]:
    """What git finds new or changed in the folder of the sources, ignored files apart; nothing without git."""
    command = ["git", "status", "--porcelain", "--untracked-files=all", "-z", "."]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        return set()
    return set(filter(None, run.stdout.split("\0")))


@pytest.fixture(scope="session", autouse=True)
def _the_tree_is_left_as_it_was() -> Iterator[None]:
    """An error of the last test if the tests have left files in the sources or changed some."""
    before = changes_of_the_tree()
    yield
    left = sorted(changes_of_the_tree() - before)
    assert not left, f"the tests left these in the tree (git status); write to tmp_path instead: {left}"


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
def small_llama(tiny_llama: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """The same of one layer, which takes half the time."""
    return partial(tiny_llama, num_hidden_layers=1)


@pytest.fixture
def tokens() -> torch.Tensor:
    """A batch of token ids [3, 11] for `tiny_llama`."""
    return devices.put(torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1)))
