"""What an adapter does on a GPU has the bits that it has on the CPU, where the kernels are the same: on the stand-in.

So a tensor that is made on the wrong device, or is left there, is an error here and not on somebody's GPU. With
`--device cuda-stand-in` the tests of layers show the same of merging, of rows with adapters of their own, and of each
kind of module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pissa
from cuda_stand_in import CudaStandIn
from daily import each
from language_models import EVERY_FORM, Make, logits
from pissa import PissaModel

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")]
forms = pytest.mark.parametrize("form", each(EVERY_FORM, ["nf4"]))

Put = Callable[[Any], Any]
"""What moves a tensor or a module to the device."""


@contextmanager
def device(name: str) -> Iterator[Put]:
    if name == "cpu":
        yield lambda value: value
        return
    with CudaStandIn() as gpu:
        yield gpu.put


def assert_same_bits(life: Callable[[str, Put], dict[str, Tensor]]) -> None:
    """Of what `life` finds, given a device and what moves to it. Whatever it finds has to be there."""
    found = {}
    for name in ("cpu", "cuda"):
        with device(name) as put:
            tensors = life(name, put)
            assert {key: tensor.device.type for key, tensor in tensors.items()} == dict.fromkeys(tensors, name)
            found[name] = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
    for key, here in found["cpu"].items():
        assert torch.equal(found["cuda"][key], here), key


def adapted(model: nn.Module, form: str, **fields: Any) -> PissaModel:
    return pissa.wrap(model, r=4, task_type="CAUSAL_LM", fuse=False, **EVERY_FORM[form], **fields)


def train(model: nn.Module, tokens: Tensor, steps: int = 2) -> Tensor:
    """The losses. A GPU's AdamW is the one over lists of tensors, so the CPU's is here too."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, foreach=True)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
    assert all(parameter.grad.device == parameter.device for parameter in parameters)
    return torch.stack(losses).detach()


def state(model: nn.Module, begin: str) -> dict[str, Tensor]:
    """All that it holds."""
    return {f"{begin} {name}": value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("form", EVERY_FORM)
@pytest.mark.parametrize("dtype", each([torch.float32, torch.bfloat16], [torch.bfloat16]))
def test_training(form: str, dtype: torch.dtype, small_llama: Make, tokens: Tensor) -> None:
    def life(name: str, put: Put) -> dict[str, Tensor]:
        model, ids = adapted(put(small_llama(dtype=dtype)), form), put(tokens)
        found = {"start": logits(model, ids), "losses": train(model, ids), "trained": logits(model, ids)}
        with model.disable_adapter():
            found["base"] = logits(model, ids)
        return found | state(model, "trained")

    assert_same_bits(life)


VARIANTS: list[dict[str, Any]] = [
    {"use_dora": True, "init": "lora"},
    {"init": "lora", "repair": "pissa", "quant": "nf4"},
    {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
    {"use_dora": True},
    {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    {"lora_dropout": 0.5},
]


@pytest.mark.parametrize("fields", each(VARIANTS, VARIANTS[:3]), ids=str)
def test_variants(fields: dict[str, Any], small_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    def life(name: str, put: Put) -> dict[str, Tensor]:
        model = pissa.wrap(put(small_llama()), r=4, task_type="CAUSAL_LM", fuse=False, **fields)
        ids = put(tokens)
        torch.manual_seed(0)  # for dropout
        found = {"losses": train(model.train(), ids), "trained": logits(model.eval(), ids)}
        model.save_pretrained(tmp_path / name)
        again = PissaModel.from_pretrained(put(small_llama()), tmp_path / name)
        assert torch.equal(logits(again, ids), found["trained"])
        return found | state(model.merge_and_unload(), "unloaded")

    assert_same_bits(life)


@forms
def test_folders_cross_devices(form: str, small_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    expected = {}
    for written in ("cpu", "cuda"):
        with device(written) as put:
            model, ids = adapted(put(small_llama()), form), put(tokens)
            train(model, ids)
            model.save_pretrained(tmp_path / written)
            expected[written] = logits(model, ids).cpu()
            train(model, ids)
            expected[f"{written} later"] = logits(model, ids).cpu()
    assert torch.equal(expected["cpu"], expected["cuda"])
    for written in ("cpu", "cuda"):
        for read in ("cpu", "cuda"):
            with device(read) as put:
                base, ids = put(small_llama()), put(tokens)
                again = PissaModel.from_pretrained(base, tmp_path / written, is_trainable=True)
                assert {tensor.device.type for tensor in (*again.parameters(), *again.buffers())} == {read}
                assert torch.equal(logits(again, ids).cpu(), expected[written])
                again.load_adapter(tmp_path / written, "second")
                again.set_adapter("second")
                assert torch.equal(logits(again, ids).cpu(), expected[written])
                again.load_adapter(tmp_path / "cpu", "third", torch_device=read)


@forms
def test_a_state_dict_moves(form: str, small_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    here = adapted(small_llama(), form)
    train(here, tokens)
    expected = logits(here, tokens)
    with CudaStandIn() as gpu:
        there, ids = adapted(gpu.put(small_llama(seed=5)), form), gpu.put(tokens)
        there.load_state_dict(here.state_dict())
        assert torch.equal(gpu.fetch(logits(there, ids)), expected)
        torch.save(there.state_dict(), tmp_path / "state.pt")
        moved = there.to("cpu")
        assert not any(tensor.is_cuda for tensor in (*moved.parameters(), *moved.buffers()))
        assert torch.equal(logits(moved, tokens), expected)
        back = adapted(small_llama(seed=6), form)
        back.load_state_dict(torch.load(tmp_path / "state.pt", map_location="cpu"))
        assert torch.equal(logits(back, tokens), expected)
        assert torch.equal(gpu.fetch(logits(here.to("cuda"), ids)), expected)
