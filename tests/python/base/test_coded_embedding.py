"""Embeddings whose weight is codes: rows are decoded when they are looked up."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from bench.compare.gguf_blocks import random_blocks, weight_of
from pissa import ops
from pissa.base.weights import CodedEmbedding, CodedLinear
from pissa.ops.formats import FORMATS
from torch_settings import default_dtype

IDS = torch.tensor([[3, 0, 19], [19, 7, 3]])


def codes(format: str, columns: int = 256) -> ops.QuantizedWeight:
    if format in FORMATS:
        return ops.quantize(torch.randn(20, columns), format)
    return weight_of(random_blocks(format, 20, columns), format)


@pytest.mark.parametrize("format", [*FORMATS, "q4_k", "q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_decoded_weight(format: str, dtype: torch.dtype) -> None:
    weight = codes(format)
    embedding = CodedEmbedding(weight, nn.Embedding(20, 256, padding_idx=3, dtype=dtype))
    assert torch.equal(embedding(IDS), functional.embedding(IDS, ops.dequantize(weight, dtype)))
    assert torch.equal(embedding(IDS[:, :0]), torch.empty(2, 0, 256, dtype=dtype))
    assert torch.equal(embedding.matrix(), ops.dequantize(weight).mT)


def test_nested_scales_may_cross_rows() -> None:
    weight = codes("nf4", 36)
    rows = ops.embedding(IDS, weight)
    assert weight.nested
    assert torch.equal(rows, ops.dequantize(weight)[IDS])


def test_what_is_looked_up_is_scaled_as_before() -> None:
    dense = Gemma3TextScaledWordEmbedding(20, 256, 0, embed_scale=16.0).bfloat16()
    weight = codes("q8_0")
    embedding = CodedEmbedding(weight, dense)
    dense.weight = nn.Parameter(ops.dequantize(weight, torch.bfloat16))
    assert torch.equal(embedding(IDS), dense(IDS))
    assert embedding.padding_idx == 0
    assert embedding.embed_scale == 16.0
    unloaded = embedding.dense_module(embedding.matrix().bfloat16())
    assert type(unloaded) is type(dense)
    assert torch.equal(unloaded(IDS), dense(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_is_a_number_is_not_rounded(dtype: torch.dtype) -> None:
    dense, weight = BartScaledWordEmbedding(20, 256, 0, embed_scale=257**0.5).to(dtype), codes("q8_0")
    embedding = CodedEmbedding(weight, dense)
    dense.weight = nn.Parameter(ops.dequantize(weight, dtype))
    with default_dtype(torch.bfloat16):
        assert torch.equal(embedding(IDS), dense(IDS))


def test_a_cast_changes_what_is_looked_up_and_not_the_codes() -> None:
    weight = codes("q4_k")
    embedding = CodedEmbedding(weight, nn.Embedding(20, 256)).bfloat16()
    assert embedding(IDS).dtype == torch.bfloat16
    assert torch.equal(embedding.quantized.codes, weight.codes)
    assert embedding.shown_weight(torch.float32).shape == (20, 256)


@pytest.mark.parametrize("bad", [-1, 20])
def test_an_index_outside_is_refused(bad: int) -> None:
    with pytest.raises(IndexError, match=f"indices: got {bad}; allowed: from 0 to 19"):
        ops.embedding(torch.tensor([1, bad]), codes("q8_0"))
    with pytest.raises(TypeError, match="indices"):
        ops.embedding(torch.ones(2), codes("q8_0"))


@pytest.mark.parametrize(("format", "dtype"), [("q8_0", torch.float32), ("mxfp4", torch.bfloat16)])
def test_its_fingerprint_is_that_of_what_libraries_decode(format: str, dtype: torch.dtype) -> None:
    weight = codes(format)
    embedding = CodedEmbedding(weight, nn.Embedding(20, 256))
    assert embedding.fingerprint_dtype == dtype == CodedLinear(weight, None).fingerprint_dtype
