"""`quant_storage`: the dtype of the parameters that hold codes says nothing about the function, and nothing that
is done to a model computes with such a parameter."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pissa
from daily import each
from language_models import Make, logits, train
from pissa import PissaModel
from pissa.base.weights import HoldsCodes

STORAGES = ["uint8", "bfloat16", "float16", "float32"]
storages = pytest.mark.parametrize("storage", each(STORAGES, ["float32"]))  # where the last number is filled up
pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning"),
]
formats = pytest.mark.parametrize("quant", ["nf4", "int8"])
# 578 and 595 bytes of codes, 1156 and 1190 of int8: the last float32 of a weight is filled up.
ODD = {"hidden_size": 34, "intermediate_size": 35, "num_attention_heads": 1, "num_key_value_heads": 1}


def wrapped(make: Make, storage: str, quant: str = "nf4") -> PissaModel:
    return pissa.wrap(make(**ODD), r=4, quant=quant, quant_storage=storage)


def codes(model: nn.Module) -> list[Tensor]:
    return [module.quantized.codes.clone() for module in model.modules() if isinstance(module, HoldsCodes)]


def same(model: nn.Module, other: list[Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(codes(model), other, strict=True))


@storages
@formats
def test_function_and_training_have_the_bits_of_uint8(
    quant: str, storage: str, small_llama: Make, tokens: Tensor
) -> None:
    model, plain = wrapped(small_llama, storage, quant), wrapped(small_llama, "uint8", quant)
    held = [module for module in model.modules() if isinstance(module, HoldsCodes)]
    assert {module.weight.dtype for module in held} == {getattr(torch, storage)}
    assert same(model, codes(plain))
    assert torch.equal(logits(model, tokens), logits(plain, tokens))
    assert train(model, tokens) == train(plain, tokens)
    model.merge_adapter()
    plain.merge_adapter()
    assert torch.equal(logits(model, tokens), logits(plain, tokens))


@storages
def test_codes_that_are_no_numbers_survive(storage: str, small_llama: Make) -> None:
    model = wrapped(small_llama, storage)
    with torch.no_grad():  # every pattern of 16 bits, signalling NaN among them
        for module in model.modules():
            if isinstance(module, HoldsCodes):
                bits = torch.arange(module.weight.view(torch.uint8).numel() // 2) * 12347 % 2**16
                module.weight.view(torch.uint8)[: 2 * len(bits)].copy_(bits.to(torch.uint16).view(torch.uint8))
    before = codes(model)
    for cast in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        assert same(model.to(cast), before)
    assert same(model.half().float().to("cpu", torch.bfloat16), before)
    assert same(copy.deepcopy(model), before)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = wrapped(small_llama, storage)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(other, before)


@storages
@formats
def test_a_saved_adapter_says_how_its_codes_are_stored(
    quant: str, storage: str, small_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    model = wrapped(small_llama, storage, quant)
    train(model, tokens)
    model.save_pretrained(tmp_path)
    again = PissaModel.from_pretrained(small_llama(**ODD), tmp_path)
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor.view(-1).view(torch.uint8), state[name].view(-1).view(torch.uint8)), name


def test_codes_that_were_cast_are_refused(small_llama: Make, tokens: Tensor) -> None:
    model = wrapped(small_llama, "bfloat16")
    weight = next(module for module in model.modules() if isinstance(module, HoldsCodes)).weight
    weight.data = weight.data.float()  # as peft.prepare_model_for_kbit_training does
    with pytest.raises(TypeError, match=r"stored as torch.bfloat16 were cast to torch.float32.*quant_storage"):
        logits(model, tokens)


def test_parameters_count_the_same(small_llama: Make) -> None:
    counts = {wrapped(small_llama, storage).get_nb_trainable_parameters() for storage in STORAGES}
    counts.add(wrapped(small_llama, "uint8", "int8").get_nb_trainable_parameters())
    assert len(counts) == 1


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quant_storage: got 'float64'; allowed: 'uint8', 'bfloat16'"):
        pissa.PissaConfig(r=4, quant="nf4", quant_storage="float64")
