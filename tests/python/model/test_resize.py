"""The vocabulary of a wrapped model, resized: in the way of transformers, or refused before anything is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pissa
from language_models import Make, assert_same, error, logits, snapshot, train
from pissa import PissaModel

SIZE = 97
pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


def resized(model: nn.Module, size: int, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.resize_token_embeddings(size, mean_resizing=False)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("size", "fields"), [(104, {}), (90, {"quant": "nf4"})])
def test_embeddings_that_nobody_trains(
    size: int, fields: dict[str, Any], tied: bool, small_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    model = pissa.wrap(small_llama(tie_word_embeddings=tied), r=4, **fields)
    tokens = tokens.clamp(max=min(size, SIZE) - 1)
    train(model, tokens)
    before = logits(model, tokens)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    resized(model, size, seed=1)
    assert model.config.vocab_size == size
    common = min(size, SIZE)
    assert torch.equal(logits(model, tokens)[..., :common], before[..., :common])
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained

    tokens[0, 0] = size - 1  # a new one
    losses = train(model, tokens)
    assert losses[-1] < losses[0]
    expected = logits(model.eval(), tokens)
    model.save_pretrained(tmp_path)  # with the vocabulary: its new rows are random
    again = PissaModel.from_pretrained(resized(small_llama(tie_word_embeddings=tied), size, seed=2), tmp_path)
    assert torch.equal(logits(again, tokens), expected)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "embeddings": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        r"model\.embed_tokens is trained \(target_modules\)",
    ),
    "output layer": ({"target_modules": ["lm_head", "q_proj"]}, r"lm_head is trained \(target_modules\)"),
    "tokens": ({"trainable_token_indices": [1]}, r"embed_tokens is trained \(trainable_token_indices\)"),
    "a head of its own": ({"modules_to_save": ["lm_head"]}, r"lm_head is trained \(modules_to_save\)"),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_embeddings_that_are_trained(case: str, tied: bool, small_llama: Make) -> None:
    fields, words = REFUSED[case]
    model = pissa.wrap(small_llama(tie_word_embeddings=tied), r=4, **fields)
    before = snapshot(model)
    for arguments in ((104,), (None, 8), (90,), (SIZE + 1, SIZE)):
        with pytest.raises(ValueError, match=rf"{words}\. Resize it before pissa\.wrap; .*merge_and_unload\(\)"):
            model.resize_token_embeddings(*arguments)
    assert_same(model, before)
    for same in ((), (SIZE,), (None, SIZE)):
        assert model.resize_token_embeddings(*same) is model.get_input_embeddings()

    ids = torch.arange(12).view(2, 6)
    expected, merged = logits(model.eval(), ids), model.merge_and_unload()
    found = logits(pissa.wrap(resized(merged, 104, seed=0), r=4), ids)
    assert error(found[..., :SIZE], expected) < 2**-24 * 1000  # sums of up to 700 terms in another order
