"""PissaConv1d to 3d: W is the weight flattened to [out, in * kernel], and a change is a convolution of r channels."""

from __future__ import annotations

from pathlib import Path

import peft
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
from pissa.layers import PissaConv1d, PissaConv2d, PissaConv3d
from reference import EPS, assert_close

IN, OUT, R = 5, 8, 3

# What differs from a plain kernel of three points in each dimension.
CASES: dict[str, tuple[type[nn.Module], dict[str, object]]] = {
    "1d": (nn.Conv1d, {"kernel_size": 3}),
    "1d-all": (nn.Conv1d, {"kernel_size": 4, "stride": 2, "padding": 3, "dilation": 2, "padding_mode": "reflect"}),
    "1d-no-bias": (nn.Conv1d, {"kernel_size": 3, "bias": False}),
    "2d": (nn.Conv2d, {"kernel_size": 3}),
    "2d-uneven": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1)}),
    "2d-point": (nn.Conv2d, {"kernel_size": 1}),
    "2d-same": (nn.Conv2d, {"kernel_size": 3, "padding": "same"}),
    "2d-dilated": (nn.Conv2d, {"kernel_size": 3, "padding": 2, "dilation": (2, 1)}),
    "2d-circular": (nn.Conv2d, {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"}),
    "2d-replicate": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "stride": 2, "padding_mode": "replicate"}),
    "3d": (nn.Conv3d, {"kernel_size": 2}),
    "3d-all": (nn.Conv3d, {"kernel_size": (1, 2, 3), "stride": 2, "padding": 1, "dilation": (1, 2, 1)}),
}
cases = pytest.mark.parametrize("case", CASES)
KINDS = {nn.Conv1d: PissaConv1d, nn.Conv2d: PissaConv2d, nn.Conv3d: PissaConv3d}
# PEFT's convolutions of r channels have the base's kernel, stride and padding, and nothing else of it.
UNKNOWN_TO_PEFT = ("dilation", "padding_mode")


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN would round the inputs of a convolution to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def convolution(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    kind, options = CASES[case]
    return put(filled(kind(IN, OUT, **options)).to(dtype))


def images(case: str, dtype: torch.dtype = torch.float32, batch: tuple[int, ...] = (2,)) -> Tensor:
    dimensions = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[CASES[case][0]]
    size = (*batch, IN, *(9, 7, 6)[:dimensions])
    return put(torch.randn(size, generator=torch.Generator().manual_seed(7)).to(dtype))


def plain(case: str):  # type: ignore[no-untyped-def]
    """The convolution in float64, with a weight [out, in * kernel]."""
    base = CASES[case][0](IN, OUT, **CASES[case][1])

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return base._conv_forward(x, weight.reshape(base.weight.shape), bias)

    return apply


def matrices(case: str) -> tuple[Tensor, Tensor | None]:
    base = convolution(case)
    bias = None if base.bias is None else fetch(base.bias.detach()).double()
    return fetch(base.weight.detach()).double().flatten(1), bias


@cases
def test_function_gradients_files_and_merging(case: str, tmp_path: Path) -> None:
    """Plain PEFT computes what is saved, but for what its convolutions have not; merged it does."""
    model, x = wrap(convolution(case), r=R, lora_alpha=2), images(case).requires_grad_()
    assert type(adapted(model)) is KINDS[CASES[case][0]]
    assert torch.equal(model(x), convolution(case)(x))
    weight, bias = matrices(case)
    points = model(x).numel() // OUT  # which dA and dB collect from
    assert_function_and_gradients(model, x, weight, bias, plain(case), terms=max(weight.shape[1], points) + OUT)

    foreign = any(option in CASES[case][1] for option in UNKNOWN_TO_PEFT)
    peft_model = assert_comes_back(model, lambda: convolution(case), x, tmp_path)
    if foreign:
        peft_model = peft_model.merge_and_unload()
    with torch.no_grad():
        assert_output(peft_model(x), adapted(model), x, weight, bias, plain(case), weight.shape[1] + 1, "plain PEFT")

    merged = assert_merges(model, weight)
    assert type(merged) is CASES[case][0]
    kernel = fetch(merged.weight.detach()).double()
    assert kernel.shape == convolution(case).weight.shape
    x, kernel = fetch(x.detach()).double(), kernel.flatten(1)
    magnitude = plain(case)(x.abs(), kernel.abs(), None if bias is None else bias.abs())
    with torch.no_grad():
        bound = (weight.shape[1] + 1) * EPS[torch.float32] * magnitude
        assert_close(merged(put(x.float())), plain(case)(x, kernel, bias), bound, "merged")


@pytest.mark.parametrize("case", ["1d", "2d-uneven", "3d"])
def test_the_state_dict_comes_back(case: str) -> None:
    model, again = (wrap(convolution(case), r=R) for _ in range(2))
    change_a_little(adapted(model))
    peft.set_peft_model_state_dict(again, peft.get_peft_model_state_dict(model))
    assert torch.equal(again(images(case)), model(images(case)))


def test_an_image_without_a_batch() -> None:
    model, x = wrap(convolution("2d-uneven"), r=R), images("2d-uneven", batch=())
    change_a_little(adapted(model))
    weight, bias = matrices("2d-uneven")
    assert_output(model(x), adapted(model), x, weight, bias, plain("2d-uneven"), weight.shape[1] + 1, "one image")


def test_the_rank_may_be_as_large_as_the_flattened_weight_lets_it() -> None:
    """test_refused has one that is larger."""
    assert adapted(wrap(convolution("2d-point"), r=5)).start_of("default").a0.shape == (5, 5)  # of a weight [8, 5]
    assert adapted(wrap(convolution("2d"), r=8)).lora_A["default"].weight.shape == (8, IN, 3, 3)
