"""Models of several threads, as a server has them: what one thread does, no other can see."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft.tuners import tuners_utils
from peft.utils import transformers_weight_conversion
from torch import Tensor, nn

import pissa
from language_models import Make, logits
from oracle import change_all
from pissa.layers.layer import PissaLayer

THREADS = 8


def merged(base: nn.Module, tokens: Tensor) -> list[Tensor]:
    """The logits of a model that is wrapped, changed, merged, split again, and unloaded."""
    model = pissa.wrap(base, r=4)
    change_all(model)
    model.merge_adapter()
    found = [logits(model, tokens)]
    model.unmerge_adapter()
    found.append(logits(model, tokens))
    return [*found, logits(model.merge_and_unload(), tokens)]


def test_threads_that_wrap_merge_and_unload_at_once_leave_peft_as_it_is(
    tiny_llama: Make, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile, too: a plain LoRA of another thread needs PEFT's own functions."""
    expected = [merged(tiny_llama(seed=seed, num_hidden_layers=1), tokens) for seed in range(THREADS)]
    peft = [(module, vars(module).copy()) for module in (tuners_utils, transformers_weight_conversion)]
    changed: set[str] = set()

    def watched(name: str) -> None:
        method = getattr(PissaLayer, name)

        def watching(layer: PissaLayer, *args: object, **kwargs: object) -> object:
            changed.update(key for module, own in peft for key, value in own.items() if vars(module)[key] is not value)
            return method(layer, *args, **kwargs)

        monkeypatch.setattr(PissaLayer, name, watching)

    for name in ("update_layer", "merge", "unmerge", "unload_and_optionally_merge_module"):
        watched(name)
    bases = [tiny_llama(seed=seed, num_hidden_layers=1) for seed in range(THREADS)]
    together = threading.Barrier(THREADS, timeout=60)

    def run(base: nn.Module) -> list[Tensor]:
        together.wait()
        return merged(base, tokens)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(run, bases))
    assert not changed
    assert all(vars(module)[key] is value for module, own in peft for key, value in own.items())
    for got, wanted in zip(found, expected, strict=True):
        assert all(map(torch.equal, got, wanted))
