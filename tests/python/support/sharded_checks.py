"""What `distributed_worker.py` checks of models that are sharded before they are wrapped. Each check returns what the
test of its name looks at, and raises on its own process's errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

import pissa
import trainers
from distributed_checks import message
from distributed_worker import FORMS, ROWS, bits, counted, in_memory, llama, mixtral, sgd, shard, share, tokens, train
from pissa import PissaModel, distributed
from pissa.base import weights
from pissa.distributed import is_sharded, rank, world_size
from pissa.layers.layer import pissa_layers
from pissa.model import decompose as decomposition

wrap = partial(pissa.wrap, fuse=False)
"""The head of a sharded model is its own, so that of a whole one has to be too, if their bits are compared."""

WHOLE = StateDictOptions(full_state_dict=True)
"""What every process is given."""

WAYS: dict[str, dict[str, Any]] = {
    "implicit": FORMS["implicit"],
    "dora": FORMS["dora"],
    "lora": {"init": "lora"},
    "seed": {"seed": 1},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
}
"""Fields of PissaConfig, beside r = 4."""


def checks(folder: Path) -> dict[str, Callable[[], Any]]:
    """By name."""
    found: list[Callable[[Path], Any]] = [trained, saved, loaded, more_adapters, accumulated, meshes]
    found += [after_a_forward_pass, merged, peak, nan, refused, loaded_by_transformers]
    return {check.__name__: partial(check, folder) for check in found}


def trained(folder: Path) -> dict[str, list[Any]]:
    """Losses, and whether all bits are the same at the end, the start factors' too: wrapped first and sharded then, or
    sharded first."""
    found = {}
    for way, fields in WAYS.items():
        first, model = wrap(llama(), r=4, **fields), wrap(shard(llama()), r=4, **fields)
        assert all(is_sharded(value) != (".lora_" in name) for name, value in model.named_parameters())
        layers = pissa_layers(model.get_base_model())
        for name, layer in pissa_layers(first.get_base_model()).items():
            fingerprints = (one.weight_fingerprint.of(one.base) for one in (layer, layers[name]))
            assert len(set(fingerprints)) == 1
        found[way] = [train(shard(first), tokens()), train(model, tokens())]
        states = [get_model_state_dict(one, options=WHOLE) for one in (first, model)]
        found[way].append(bits(states[0]) == bits(states[1]))
    return found


def tied_llama() -> nn.Module:
    """A model whose output layer has the weight of its embeddings, as many have."""
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def saved(folder: Path) -> None:
    """Rank 0 writes the adapter, of which it has all. The others are not asked for anything."""
    first, model = shard(wrap(tied_llama(), r=4)), wrap(shard(tied_llama()), r=4)
    train(first, tokens()), train(model, tokens())
    state = get_model_state_dict(first, options=WHOLE)
    if rank() == 0:
        first.save_pretrained(folder / "wrapped_first", state_dict=state)
        model.save_pretrained(folder / "sharded_first")
    dist.barrier()


def loaded(folder: Path) -> dict[str, list[float]]:
    """Losses of a folder that is loaded onto a whole model, a sharded one, and one that is made to be trained later."""
    target = folder / "sharded_first"
    whole = PissaModel.from_pretrained(tied_llama(), target, is_trainable=True, fuse=False).train()
    model = PissaModel.from_pretrained(shard(tied_llama()), target, is_trainable=True, fuse=False).train()
    later = PissaModel.from_pretrained(shard(tied_llama()), target, fuse=False).train()
    for name, parameter in later.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    found = {
        "whole": train(DistributedDataParallel(whole), tokens()),
        "sharded": train(model, tokens()),
        "later": train(later, tokens()),
    }
    model.load_adapter(target, "default", is_trainable=True)
    return found | {"again": train(model, tokens())}


def more_adapters(folder: Path) -> list[list[float]]:
    """Losses of a second adapter."""
    found = []
    for build in (llama, lambda: shard(llama())):
        model = wrap(build(), r=4)
        model.add_adapter("second", pissa.PissaConfig(r=2))
        model.set_adapter("second")
        found.append(train(model if found else DistributedDataParallel(model), tokens()))
    return found


def accumulated(folder: Path) -> dict[str, list[float]]:
    """Norms of the gradients of two batches together, which are clipped, and losses then: of one process, and here."""
    whole, model = wrap(llama(), r=4), wrap(shard(llama()), r=4)
    for batch in (tokens(), tokens().flip(1)):
        for rows in batch.chunk(world_size()):
            (whole(input_ids=rows, labels=rows).loss / world_size()).backward()
        model(input_ids=share(batch), labels=share(batch)).loss.backward()
    norms = [float(nn.utils.clip_grad_norm_(one.parameters(), 1.0)) for one in (whole, model)]
    for one in (whole, model):
        sgd(one).step()
    loss = [float(one(input_ids=tokens(), labels=tokens()).loss) for one in (whole, model)]
    return {"norms": norms, "losses": loss}


def meshes(folder: Path) -> dict[str, list[float]]:
    """Losses on other meshes than fully_shard's own, and with weights that wait on the CPU."""
    size = world_size()
    options = {
        "named": {"mesh": init_device_mesh("cpu", (size,), mesh_dim_names=("dp_shard",))},
        "replicated": {"mesh": init_device_mesh("cpu", (1, size), mesh_dim_names=("dp_replicate", "dp_shard"))},
        "replicas": {"mesh": init_device_mesh("cpu", (size, 1), mesh_dim_names=("dp_replicate", "dp_shard"))},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }
    return {name: train(wrap(shard(llama(), **some), r=4), tokens()) for name, some in options.items()}


def after_a_forward_pass(folder: Path) -> list[float]:
    """Losses of a model that has computed before, so that FSDP keeps whole weights of it: all of them, for only the
    model itself is sharded."""
    model = fully_shard(llama())
    model(input_ids=tokens())
    assert not any(is_sharded(parameter) for parameter in model.parameters())
    return train(wrap(model, r=4), tokens())


def merged(folder: Path) -> list[float]:
    """A loss before, while and after the adapter is merged. A layer has a bias."""
    model = llama()
    model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.linspace(-1, 1, 34))
    model, found = wrap(shard(model), r=4), []
    train(model, tokens())
    for change in (lambda: None, model.merge_adapter, model.unmerge_adapter):
        change()
        found.append(float(model(input_ids=tokens(), labels=tokens()).loss))
    return found


def peak(folder: Path) -> int:
    """Whole weights that are alive at once, at most, where a group is a layer."""
    alive: list[StorageWeakRef] = []
    most: list[int] = []
    whole_tensor, limit = distributed.whole_tensor, decomposition._GROUP
    distributed.whole_tensor = weights.whole_tensor = counted(alive, most)
    decomposition._GROUP = 1
    try:
        wrap(shard(llama()), r=4, use_dora=True)
    finally:
        distributed.whole_tensor = weights.whole_tensor = whole_tensor
        decomposition._GROUP = limit
    assert len(alive) == 3 * 7  # for its fingerprint, for its start, and for the lengths of its rows
    assert in_memory(alive, 0) == 0
    return max(most)


def nan(folder: Path) -> list[Any]:
    """The error of a weight with NaN, which only the rank that decomposes it finds, and what the model can do then."""
    model = llama()
    value = model.model.layers[0].mlp.up_proj.weight[3, 5].item()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = float("nan")
    model = shard(model)
    found: list[Any] = [message(partial(pissa.wrap, model, r=4))]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.to_local().nan_to_num_(value)
    return [*found, train(wrap(model, r=4), tokens())]


def refused(folder: Path) -> dict[str, list[str]]:
    """What cannot be wrapped once it is sharded."""
    alone, tensor_parallel = llama(), llama()
    fully_shard(alone.model.layers[0].self_attn.q_proj)
    plan = {"model.layers.0.self_attn.q_proj": ColwiseParallel()}
    parallelize_module(tensor_parallel, init_device_mesh("cpu", (world_size(),)), plan)
    flat = FullyShardedDataParallel(llama(), use_orig_params=True, device_id=torch.device("cpu"))
    computed = fully_shard(llama())
    computed(input_ids=tokens())
    stored = folder / "stored"
    model = wrap(llama(), r=4, quant="nf4")
    if rank() == 0:
        model.save_pretrained(stored)
    dist.barrier()

    def wrapped(model: nn.Module, **fields: Any) -> list[str]:
        return message(partial(pissa.wrap, model, r=4, **fields))

    codes = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_storage=torch.float32)).requires_grad_(False).to("cpu")
    return {
        "bitsandbytes": wrapped(fully_shard(codes), target_modules=["0"]),
        "quant": wrapped(shard(llama()), quant="nf4"),
        "whole weights": wrapped(computed, quant="nf4"),
        "explicit": wrapped(shard(llama()), residual="explicit"),
        "modules_to_save": wrapped(shard(llama()), modules_to_save=["lm_head"]),
        "task_type": wrapped(shard(llama()), task_type="SEQ_CLS"),
        "bias": wrapped(shard(llama()), bias="all"),
        "trainable_token_indices": wrapped(shard(llama()), trainable_token_indices=[1]),
        "experts": wrapped(shard(mixtral()), target_modules="all-linear"),
        "a layer alone": wrapped(alone),
        "FSDP1": wrapped(flat, target_modules=["q_proj"]),
        "tensor parallel": wrapped(tensor_parallel),
        "load": message(partial(PissaModel.from_pretrained, shard(llama()), stored)),
    }


def loaded_by_transformers(folder: Path) -> list[list[float]]:
    """Losses of transformers' Trainer, of a model that DDP replicates and of one that from_pretrained has sharded."""
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments
    from transformers.distributed import DistributedConfig

    base = folder / "base"
    if rank() == 0:
        llama().save_pretrained(base)
    dist.barrier()
    found = []
    for options in ({}, {"distributed_config": DistributedConfig(fsdp_size=world_size())}):
        model = wrap(LlamaForCausalLM.from_pretrained(base, **options), r=4)
        assert any(is_sharded(parameter) for parameter in model.parameters()) == bool(options)
        target = folder / f"trainer-{len(found)}"
        fields = trainers.options(target, per_device_train_batch_size=ROWS // world_size(), save_only_model=True)
        arguments = TrainingArguments(**fields | {"optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 0.5})
        run = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens()])
        run.train()
        found.append(trainers.logged(run))
        dist.barrier()
    return found
