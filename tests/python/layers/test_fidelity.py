"""The change survives bfloat16: as our layer applies it, and as plain PEFT applies it from the saved folder.

The paper converts a trained adapter into [B, -B0] [A ; A0]. That is a small difference of large terms, which
bfloat16 rounds away; [dB | B0] [A ; dA] is the same product without the cancellation.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import pissa
from language_models import Make
from oracle import change64, deltas64
from pissa.layers import PissaLinear


def applied(layer: nn.Module) -> Tensor:
    """The weight that a layer applies, without its base weight, whose rounding would drown the rest."""
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        return layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).T.double()


def test_the_change_is_exact_in_bfloat16(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(dtype=torch.bfloat16), r=8)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0)  # the paper's rate
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    base = tiny_llama(dtype=torch.bfloat16)
    plain = peft.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    others = dict(plain.base_model.model.named_modules())

    missed = []
    for name, layer in model.base_model.model.named_modules():
        if not isinstance(layer, PissaLinear):
            continue
        start, da, db = (
            layer.start_of("default"),
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
        )
        a0, b0 = start.a0.double(), start.b0.double()
        a, b = a0 + da.detach().double(), b0 + db.detach().double()
        change = change64(layer, *deltas64(layer)).detach()
        papers = torch.cat([b, -b0], dim=1).bfloat16().double() @ torch.cat([a, a0]).bfloat16().double()
        ours, theirs = applied(layer), applied(others[name])
        assert theirs.abs().max() > 0
        missed.append([((got - change).norm() / change.norm()).item() for got in (ours, theirs, papers)])
    ours, theirs, papers = torch.tensor(missed).T
    print(f"median error of the change: ours {ours.median():.2%}, plain PEFT {theirs.median():.2%}, "
          f"the paper's conversion {papers.median():.2%}")  # fmt: skip
    assert len(missed) == 14
    assert ours.max() < 0.02
    assert theirs.max() < 0.02
    assert papers.median() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_of_the_saved_folder_is_the_base(
    dtype: torch.dtype, tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    pissa.wrap(tiny_llama(dtype=dtype), r=8).save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=tokens).logits, tiny_llama(dtype=dtype)(input_ids=tokens).logits)
