"""PissaEmbedding: W is the table, transposed, and a token picks one of its columns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from devices import fetch, put
from one_layer import (
    adapted,
    assert_comes_back,
    assert_function_and_gradients,
    assert_merges,
    assert_output,
    filled,
    wrap,
)
from oracle import change_a_little
from pissa.layers import PissaEmbedding
from reference import EPS, assert_close

VOCABULARY, DIM, R = 29, 20, 4


def table(dtype: torch.dtype = torch.float32, **options: object) -> nn.Embedding:
    return put(filled(nn.Embedding(VOCABULARY, DIM, **options)).to(dtype))


def scaled(dtype: torch.dtype = torch.float32) -> nn.Embedding:
    """Gemma's, which multiplies what it looks up by the root of the size."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return put(filled(Gemma3TextScaledWordEmbedding(VOCABULARY, DIM, None, embed_scale=DIM**0.5)).to(dtype))


def ids() -> Tensor:
    return put(torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1)))


def look_up(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return weight.T[x]


def look_up_scaled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return float(torch.tensor(DIM**0.5)) * weight.T[x]


KINDS = {"plain": (table, look_up), "scaled": (scaled, look_up_scaled)}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_function_gradients_files_and_merging(kind: str, tmp_path: Path) -> None:
    (make, apply), x = KINDS[kind], ids()
    model = wrap(make(), r=R, lora_alpha=3)
    assert isinstance(adapted(model), PissaEmbedding)
    assert torch.equal(model(x), make()(x))
    base = fetch(make().weight.detach()).double().T
    # A token's column of dA collects from all its places and features, the columns of dB from all places.
    assert_function_and_gradients(model, x, base, None, apply, terms=x.numel() + DIM)
    plain = assert_comes_back(model, make, x, tmp_path)
    with torch.no_grad():
        assert_output(plain(x), adapted(model), x, base, None, apply, terms=1, what="plain PEFT")
    merged = assert_merges(model, base)
    assert type(merged) is type(make())
    assert merged.weight.is_contiguous()
    expected = apply(fetch(x), fetch(merged.weight.detach()).double().T)
    assert_close(merged(x).detach(), expected, 0 * base[0, 0], "merged")


@kinds
def test_bfloat16_rounds_the_change_once(kind: str) -> None:
    make, apply = KINDS[kind]
    model, x = wrap(make(torch.bfloat16), r=R), ids()
    layer = adapted(model)
    change_a_little(layer)
    base, delta = (fetch(t.detach()).double() for t in (layer.base_layer.weight.T, layer.delta_matrix("default")))
    with torch.no_grad():
        looked_up = fetch(make(torch.bfloat16)(x)).double()
        expected, change = looked_up + apply(x.cpu(), delta), apply(x.cpu(), delta).abs()
        magnitude = apply(x.cpu(), base).abs() + 2 * change
        # The change to bfloat16, what Gemma scales it by in bfloat16, its sum with the base.
        assert_close(model(x), expected, 3 * EPS[torch.bfloat16] * magnitude, "bfloat16")


def test_the_row_of_the_padding_token_collects_no_gradient() -> None:
    """torch trains no row of padding_idx; an adapter that did would move what the base keeps at zero."""
    model, x = wrap(table(padding_idx=2), r=R), ids()
    x[0, :3] = 2
    layer = adapted(model)
    change_a_little(layer)
    model(x).square().sum().backward()
    gradient = layer.lora_embedding_A["default"].grad
    assert not gradient[:, 2].any()
    seen = [token for token in x.unique().tolist() if token != 2]
    assert gradient[:, seen].abs().amax(0).min() > 0
