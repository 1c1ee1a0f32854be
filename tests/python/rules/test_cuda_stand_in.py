"""The stand-in for a GPU refuses what a GPU does, and takes what it takes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from cuda_stand_in import CudaStandIn

pytestmark = pytest.mark.cpu_only


@pytest.fixture
def gpu() -> Iterator[CudaStandIn]:
    with CudaStandIn() as gpu:
        yield gpu


@pytest.mark.parametrize(
    "mixed",
    [
        lambda here, there: here + there,
        lambda here, there: there.mul_(here),
        lambda here, there: torch.cat([there, here]),
        lambda here, there: nn.functional.linear(there, there, here[0]),
        lambda here, there: torch._foreach_add([there, there], [there, here]),
        lambda here, there: torch.add(there, there, out=here),
        lambda here, there: torch.ops.pissa.residual(there, there, here, 1.0),
        lambda here, there: torch.ops.pissa.quantize_absmax(there.view(-1), here.sum()),
    ],
)
def test_devices_are_not_mixed(mixed: Callable[[Tensor, Tensor], object], gpu: CudaStandIn) -> None:
    with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
        mixed(torch.ones(4, 4), gpu.put(torch.ones(4, 4)))


def test_a_number_of_the_cpu_is_read(gpu: CudaStandIn) -> None:
    there, number = gpu.put(torch.ones(3)), torch.tensor(2.0)
    for result in (there * number, there.mul_(number), torch.where(there > 0, there, number)):
        assert gpu.has(result)
        assert result.device == torch.device("cuda:0")


@pytest.mark.parametrize(
    "random",
    [
        lambda there, generator: torch.randn(3, device="cuda", generator=generator),
        lambda there, generator: there.normal_(generator=generator),
        lambda there, generator: nn.init.uniform_(there, generator=generator),
    ],
)
def test_a_generator_of_the_cpu_is_refused(
    random: Callable[[Tensor, torch.Generator], object], gpu: CudaStandIn
) -> None:
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        random(gpu.put(torch.ones(3)), torch.Generator())


def test_what_is_made_without_a_device_is_on_the_cpu(gpu: CudaStandIn) -> None:
    there = gpu.put(torch.ones(3))
    assert not torch.zeros(3).is_cuda
    for tensor in (torch.zeros_like(there), there.new_zeros(3), torch.zeros(3, device=there.device), there[1:]):
        assert tensor.is_cuda
    assert not there.cpu().is_cuda


def test_copies_and_files_know_where_they_are(gpu: CudaStandIn) -> None:
    layer = gpu.put(nn.BatchNorm1d(4))
    copies = copy.deepcopy(layer)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    for where, cuda in ((None, True), ("cpu", False), ("cuda:0", True)):
        file.seek(0)
        loaded = torch.load(file, map_location=where)
        assert {tensor.is_cuda for tensor in loaded.values()} == {cuda}
    assert all(tensor.is_cuda for tensor in (*copies.parameters(), *copies.buffers()))
