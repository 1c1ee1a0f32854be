"""What runs in several processes (torchrun), and writes what it finds as JSON for the test that has launched it.

    torchrun --standalone --nproc-per-node=2 distributed_worker.py checks FOLDER
    torchrun --standalone --nproc-per-node=2 distributed_worker.py resumes FOLDER
    torchrun --standalone --nproc-per-node=2 distributed_worker.py sharded FOLDER
    torchrun --standalone --nproc-per-node=2 distributed_worker.py architectures FOLDER [NAME ...]

Starting a process costs seconds, so that one launch does all checks of `distributed_checks`, or of `sharded_checks`.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

import language_models
import pissa
from pissa import distributed, notices
from pissa.base.digest import xxh3
from pissa.distributed import rank, world_size

QUIET = (
    ("", notices.InexactLoraWarning),
    ("", notices.AllLinearWarning),
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),
)

FORMS: dict[str, dict[str, Any]] = {
    **language_models.FORMS,
    "nf4 in bfloat16": {"quant": "nf4", "quant_storage": "bfloat16"},
    "nf4 in float32": {"quant": "nf4", "quant_storage": "float32"},
    "dora": {"use_dora": True},
}
"""Fields of PissaConfig, beside r = 4."""

DAILY = ("implicit", "nf4", "nf4 in float32", "dora")
"""Those that run on every change."""

ROWS = 6
"""Of a batch: as many for each of 1, 2 or 3 processes."""

# Sums over the 60 tokens are taken in another order: a loss is one, and so are the gradients of the steps before it, 5
# at most. A sum of n terms has a relative error of n units roundoff in any order.
SAME = {"rel": 6 * 60 * 2**-24}


# ---- Models and training, the same in one process --------------------------------------------------------------------


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


SIZES = {
    "vocab_size": 97,
    "hidden_size": 34,  # sizes that no number of processes divides, and codes that do not fill the last float32
    "intermediate_size": 55,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


def llama(seed: int = 0) -> nn.Module:
    """A random model of one block, which is a group of FSDP beside the rest."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), seed)


def mixtral(seed: int = 0) -> nn.Module:
    """One with 8 experts a block, of which a token goes to one: with a few tokens some are at rest."""
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 8, "num_experts_per_tok": 1}
    return _seeded(lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **experts)), seed)


def tokens(columns: int = 11) -> Tensor:
    """A batch of token ids [ROWS, columns]."""
    return torch.randint(0, 97, (ROWS, columns), generator=torch.Generator().manual_seed(1))


def share(batch: Tensor) -> Tensor:
    """The rows of this process."""
    return batch.chunk(world_size())[rank()]


def mean(loss: Tensor) -> float:
    """Of all processes."""
    loss = loss.detach().clone()
    if world_size() > 1:
        dist.all_reduce(loss)
    return loss.item() / world_size()


def sgd(model: nn.Module, momentum: float = 0.0) -> torch.optim.Optimizer:
    """An optimizer that does not enlarge small differences of gradients, as Adam does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=0.2, momentum=momentum)


def train(
    model: nn.Module, batch: Tensor, steps: int = 3, optimizer: torch.optim.Optimizer | None = None
) -> list[float]:
    """Losses of a few steps on the whole batch, of which each process computes its share."""
    optimizer = optimizer or sgd(model)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=share(batch), labels=share(batch)).loss
        loss.backward()
        optimizer.step()
        losses.append(mean(loss))
    return losses


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2 as its documentation has it: each block, then the rest."""
    for module in list(model.modules()):
        if type(module).__name__.endswith("DecoderLayer"):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def bits(state: Mapping[str, Tensor]) -> str:
    """Tells a state dict from any other, to the bit."""
    return xxh3(*(state[name].detach().reshape(-1).view(torch.uint8) for name in sorted(state)))


def in_memory(storages: Sequence[StorageWeakRef], expected: int) -> int:
    """How many of the storages are in memory. Gloo's thread frees the result of a collective some milliseconds after
    the caller has it, so this waits up to 2 seconds until no more than `expected` are left."""
    end = time.monotonic() + 2
    while (found := sum(not storage.expired() for storage in storages)) > expected and time.monotonic() < end:
        time.sleep(0.001)
    return found


def counted(alive: list[StorageWeakRef], most: list[int]) -> Callable[[Tensor], Tensor]:
    """`whole_tensor`, which adds what it gathers to `alive`, and to `most` how much of that is in memory then: two
    whole weights are expected, this process's and the one that another asked for."""
    original = distributed.whole_tensor

    def whole_tensor(tensor: Tensor) -> Tensor:
        found = original(tensor)
        if found is not tensor:
            alive.append(StorageWeakRef(found.untyped_storage()))
        most.append(in_memory(alive, 2))
        return found

    return whole_tensor


# ---- Launched --------------------------------------------------------------------------------------------------------


def report(path: Path, checks: dict[str, Callable[[], Any]]) -> None:
    """Runs the checks and writes {name: {"value": ...}} or {name: {"error": ...}}. Where one process fails and leaves
    the others waiting, they end when the process group's time is up."""
    found: dict[str, Any] = {}
    for name, check in checks.items():
        try:
            found[name] = {"value": check()}
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        path.write_text(json.dumps(found))


def step_of_architecture(name: str, fields: dict[str, Any], parallel: str) -> str:
    """One step of training with a batch of its own in each process: "pass", "refused: ..." or "error: ..."."""
    from architectures import ARCHITECTURES

    architecture = ARCHITECTURES[name]
    batches = [architecture.batch(seed) for seed in range(world_size())]
    mine = batches[rank()]
    try:
        model = pissa.wrap(architecture.make(), **architecture.config(**fields))
    except (TypeError, ValueError) as error:
        return f"refused: {error}"
    try:
        # What it has to be: the step along the mean of the gradients of all processes' losses.
        alone = pissa.wrap(architecture.make(), **architecture.config(**fields))
        for batch in batches:
            (alone(**batch).loss / world_size()).backward()
        sgd(alone).step()
        if parallel == "ddp":
            # Models have parameters that their loss does not use, as a pooler.
            wrapped: nn.Module = DistributedDataParallel(model, find_unused_parameters=True)
        else:
            blocks = tuple(getattr(model.get_base_model(), "_no_split_modules", None) or ())
            for module in reversed(list(model.modules())):  # a block inside another comes first
                if type(module).__name__ in blocks:
                    fully_shard(module)
            wrapped = fully_shard(model)
        optimizer = sgd(wrapped)
        wrapped(**mine).loss.backward()
        optimizer.step()
        with torch.no_grad():
            got, expected = wrapped(**mine).loss.item(), alone(**mine).loss.item()
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"
    # The two sum gradients in another order, over the tokens of a batch and the processes.
    tolerance = max(value.numel() for value in mine.values()) * world_size() * 2**-24 * max(1.0, abs(expected))
    return "pass" if abs(got - expected) <= tolerance else f"error: loss {got}, expected {expected}"


def architectures(names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Checks of DDP and FSDP2 for architectures, all by default, dense and in 4 bits."""
    from architectures import ARCHITECTURES

    return {
        f"{name}, {form}, {parallel}": lambda case=(name, fields, parallel): step_of_architecture(*case)
        for name in names or ARCHITECTURES
        for form, fields in language_models.TWO_FORMS.items()
        for parallel in ("ddp", "fsdp2")
    }


def main(mode: str, folder: Path, names: Sequence[str]) -> None:
    for message, category in QUIET:
        warnings.filterwarnings("ignore", message, category)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    if mode in ("checks", "resumes"):
        import distributed_checks

        checks = getattr(distributed_checks, mode)(folder)
    elif mode == "sharded":
        import sharded_checks

        checks = sharded_checks.checks(folder)
    else:
        checks = architectures(names)
    report(folder / f"{mode}-{world_size()}-{rank()}.json", checks)
    if rank() == 0 and mode == "architectures":
        print((folder / f"{mode}-{world_size()}-{rank()}.json").read_text())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
