"""The memory of a wrap whose bases are stored: at most the dense model and one layer; no mapped file afterwards. It is
counted in the storages of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaForCausalLM

import pissa
from daily import each
from language_models import Make
from live_bytes import LiveBytes
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.model.store import own_memory

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")]

STORED: dict[str, dict[str, Any]] = {
    "explicit": {"residual": "explicit"},
    "nf4": {"quant": "nf4"},
    "int8": {"quant": "int8"},
}


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("form", each(STORED, ["explicit", "nf4"]))
def test_the_peak_is_the_dense_model_and_one_layer(
    form: str, tiny_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pissa.model.decompose._GROUP", 1)
    base = tiny_llama(dtype=torch.bfloat16, num_hidden_layers=6)
    dense = size(base.parameters()) + size(base.buffers())
    weights = [module.weight for module in base.modules() if type(module) is nn.Linear and module is not base.lm_head]
    largest = max(size([weight]) for weight in weights)
    storages = [StorageWeakRef(weight.untyped_storage()) for weight in weights]
    start_from, left = PissaLayer.start_from, []

    def counted(*args: Any) -> None:
        left.append(sum(not storage.expired() for storage in storages))
        start_from(*args)

    monkeypatch.setattr(PissaLayer, "start_from", counted)
    with LiveBytes([*base.parameters(), *base.buffers()]) as alive:
        del weights
        model = pissa.wrap(base, r=2, **STORED[form])
    assert left == list(reversed(range(len(left))))  # as soon as its residual is there
    trained = size(parameter for parameter in model.parameters() if parameter.requires_grad)
    kept = size(layer.base_layer.weight for layer in pissa_layers(base).values())
    assert kept > 6 * largest
    # dA, dB and A0, B0 of all layers, which are as large; the residual of one layer, and what makes it, in float32.
    assert dense < alive.peak <= dense + 2 * trained + 6 * largest
    assert alive.now() == size(model.parameters()) + size(model.buffers())


def is_mapped(folder: Path) -> bool:
    """Whether this process has a file of that folder mapped."""
    return str(folder) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("tied", [False, True])
def test_no_mapped_file_is_kept(tied: bool, tiny_llama: Make, tmp_path: Path) -> None:
    """The tensors that stay, biases and buffers among them, are the same objects with the same values."""
    fields = {"dtype": torch.bfloat16, "tie_word_embeddings": tied, "attention_bias": True}
    tiny_llama(**fields).save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    base.register_buffer("of_the_file", base.model.norm.weight.detach())
    assert is_mapped(tmp_path)
    before = {name: (id(parameter), parameter.detach().clone()) for name, parameter in base.named_parameters()}
    pissa.wrap(base, r=2, quant="nf4")
    assert not is_mapped(tmp_path)
    assert base.of_the_file.data_ptr() == base.model.norm.weight.data_ptr()
    assert (base.lm_head.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()) == tied
    after = {name.replace("base_layer.", ""): parameter for name, parameter in base.named_parameters()}
    same = [name for name in before if name in after and after[name].dtype == torch.bfloat16]
    assert {"model.norm.weight", "model.layers.0.self_attn.q_proj.bias"} <= set(same)
    for name in same:
        assert (id(after[name]), True) == (before[name][0], torch.equal(after[name], before[name][1])), name


def test_a_file_stays_mapped_where_nothing_is_stored(tiny_llama: Make, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path)
    places = sorted(parameter.data_ptr() for parameter in base.parameters())
    model = pissa.wrap(base, r=2)
    assert places == sorted(p.data_ptr() for p in model.parameters() if not p.requires_grad)


def test_views_get_memory_of_their_own() -> None:
    memory = torch.arange(12.0)
    model = nn.Module()
    model.whole, model.again = nn.Parameter(memory[:6]), nn.Parameter(memory[:6])
    model.register_buffer("columns", memory[6:].view(2, 3).mT)
    model.alone = nn.Parameter(torch.ones(2))
    alone = model.alone.data_ptr()
    own_memory(model)
    assert model.whole.data_ptr() == model.again.data_ptr() != memory.data_ptr()
    assert model.columns.untyped_storage().nbytes() == 6 * 4
    assert torch.equal(model.columns, memory[6:].view(2, 3).mT)
    assert model.columns.stride() == (1, 3)
    assert model.alone.data_ptr() == alone
