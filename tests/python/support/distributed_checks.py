"""The checks that `distributed_worker.py` runs in every process. Each returns what the test of its name looks at, and
raises on its own process's errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import pissa
from distributed_worker import DAILY, FORMS, bits, llama, mixtral, sgd, shard, share, tokens, train
from language_models import assert_same, logits, snapshot
from pissa import PissaModel
from pissa.base.digest import fingerprint
from pissa.base.remembered import ResidualFingerprint, WeightFingerprint
from pissa.base.stored import residual_tensors
from pissa.base.weights import HoldsCodes
from pissa.distributed import is_sharded, rank, world_size
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.model import decompose as decomposition

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
ALL = StateDictOptions(full_state_dict=True)
"""On every process, not on the first alone."""
SHARDS_BYTES = Version(torch.__version__) >= Version("2.12")
"""Whether FSDP2 takes codes in uint8."""


def message(call: Callable[[], Any]) -> list[str]:
    """The type and the words of the error that the call ends with."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    raise AssertionError("no error")


def checks(folder: Path) -> dict[str, Callable[[], Any]]:
    """By name."""
    found: list[Callable[[Path], Any]] = [shares, failing, nan, ddp, suggested, other_models, sharded_weights, fsdp1]
    if SHARDS_BYTES:
        found += [fsdp2, mixed_precision, parts_sharded_alone, accelerate_fsdp2, files, merged_while_sharded]
        found += [experts]  # last what can end the process, where gradients of different parameters meet
    return {"started": started} | {check.__name__: partial(check, folder) for check in found}


def resumes(folder: Path) -> dict[str, Callable[[], Any]]:
    """What two processes begin and three go on with."""
    return {"resumed": partial(resumed, folder)}


def forms() -> dict[str, dict[str, Any]]:
    """Those of a launch: of three processes, which runs at night, all of them."""
    return {form: fields for form, fields in FORMS.items() if form in DAILY or world_size() == 3}


# ---- Starts ----------------------------------------------------------------------------------------------------------


def started() -> dict[str, str]:
    """The bits of every model that this process wraps, alone or with others."""
    found = {form: bits(pissa.wrap(llama(), r=4, **fields).state_dict()) for form, fields in FORMS.items()}
    found["experts"] = bits(pissa.wrap(mixtral(), r=4).state_dict())
    model = pissa.wrap(llama(), r=4, quant="nf4", init="lora", repair="pissa", quant_iters=2)
    found["LoRA on pissa"] = bits(model.state_dict())
    found["PiSSA on lora"] = bits(pissa.wrap(llama(), r=4, quant="nf4", repair="lora").state_dict())
    for name, fields in {"repaired": {"repair": "activations"}, "fed back": {}}.items():
        fields = {"init": "lora", "quant": "nf4", "error_feedback": True, **fields}
        fields["target_modules"] = ["q_proj", "v_proj", "gate_proj"]  # down_proj has an odd number of columns
        model = pissa.wrap(llama(), r=4, **fields, calibration=[tokens(11)])
        found[name] = bits(model.state_dict())
    model = pissa.wrap(llama(), r=4)
    model.add_adapter("second", pissa.PissaConfig(r=2, seed=1))
    return found | {"second": bits(model.state_dict())}


def shares(folder: Path) -> dict[str, int]:
    """Elements of the layers that this process has decomposed."""
    sizes: dict[str, int] = {}
    original = decomposition.start_with_codes

    def counted(task: Any) -> Any:
        sizes.update({name: weight.numel() for name, weight in zip(task.names, task.weights, strict=True)})
        return original(task)

    decomposition.start_with_codes = counted
    try:
        model = pissa.wrap(llama(), r=4, quant="nf4")
    finally:
        decomposition.start_with_codes = original
    for layer in pissa_layers(model.base_model.model, "default").values():
        kept = residual_tensors(layer.base_layer.residual).values()
        assert layer.residual_fingerprint.of(layer.base) == fingerprint(*kept)
    return sizes


def failing(folder: Path) -> dict[str, list[str]]:
    """What each way to fail on the last rank alone ends with; the model is as it was, and can be wrapped."""
    last = rank() == world_size() - 1
    model = llama()
    before = snapshot(model)
    found = {
        "while PEFT injects": message(lambda: pissa.wrap(model, r=1000 if last else 4, target_modules=["q_proj"])),
        "in the arguments": message(lambda: pissa.wrap(model, r=4, **({"seed": -1} if last else {}))),
    }
    original = PissaLayer.start_from

    def fails(*args: Any) -> None:
        raise MemoryError("planted")

    try:
        if last:
            PissaLayer.start_from = fails
        found["at the end"] = message(lambda: pissa.wrap(model, r=4))
    finally:
        PissaLayer.start_from = original
    assert_same(model, before)
    original = PissaLayer.store_base
    try:
        if last:
            PissaLayer.store_base = fails
        found["while bases are replaced"] = message(lambda: pissa.wrap(llama(), r=4, quant="nf4"))
    finally:
        PissaLayer.store_base = original
    wrapped = pissa.wrap(model, r=4)
    before = snapshot(wrapped)
    name = "default" if last else "second"
    found["a second adapter"] = message(lambda: wrapped.add_adapter(name, pissa.PissaConfig(r=2)))
    assert_same(wrapped, before)
    train(DistributedDataParallel(wrapped), tokens(), steps=1)
    return found


def nan(folder: Path) -> list[str]:
    """A weight with NaN, which only the rank that decomposes it finds."""
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = float("nan")
    before = snapshot(model)
    found = message(lambda: pissa.wrap(model, r=4))
    assert_same(model, before)
    return found


def other_models(folder: Path) -> dict[str, list[str]]:
    """Models and configurations that are not the same in every process."""
    wrapped = pissa.wrap(llama(), r=4)
    wrapped.add_adapter("second", pissa.PissaConfig(r=2))
    if rank():
        wrapped.delete_adapter("second")  # whose start factors the next one would share
    return {
        "weights": message(lambda: pissa.wrap(llama(seed=rank()), r=4)),
        "configuration": message(lambda: pissa.wrap(llama(), r=4, seed=rank())),
        "layers": message(lambda: pissa.wrap(llama() if rank() else nn.Sequential(nn.Linear(8, 8)), r=4)),
        "adapters": message(lambda: wrapped.add_adapter("third", pissa.PissaConfig(r=2))),
    }


def sharded_weights(folder: Path) -> dict[str, list[str]]:
    """What is refused because FSDP has come first."""
    wrapped = shard(pissa.wrap(llama(), r=4))
    return {
        "add_adapter": message(lambda: wrapped.add_adapter("second", pissa.PissaConfig(r=4))),
        "save_pretrained": message(lambda: wrapped.save_pretrained(folder / "sharded")),
    }


# ---- Training --------------------------------------------------------------------------------------------------------


def recomputing(model: nn.Module) -> nn.Module:
    """The model, which computes its blocks again in the backward pass."""
    model.train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def ddp(folder: Path) -> dict[str, list[float]]:
    """Losses."""
    found = {}
    for form, fields in forms().items():
        found[form] = train(DistributedDataParallel(pissa.wrap(llama(), r=4, **fields)), tokens())
    found["nf4, recomputed"] = train(
        DistributedDataParallel(recomputing(pissa.wrap(llama(), r=4, quant="nf4"))), tokens()
    )
    # Nothing that a model computes with changes, but the trained parameters: there is nothing to send again.
    model = DistributedDataParallel(pissa.wrap(llama(), r=4, quant="nf4"), broadcast_buffers=False)
    return found | {"nf4, no buffers": train(model, tokens())}


def fsdp2(folder: Path) -> dict[str, list[float]]:
    """Losses. Packed weights are sharded, and hold the same bits at the end."""
    found = {}
    for form, fields in forms().items():
        model = pissa.wrap(llama(), r=4, **fields)
        packed = {name: module for name, module in model.named_modules() if isinstance(module, HoldsCodes)}
        before = {name: module.quantized.codes.clone() for name, module in packed.items()}
        dtypes = {module.weight.dtype for module in packed.values()}
        assert dtypes <= {getattr(torch, fields.get("quant_storage", "uint8"))}
        model = shard(model)
        for module in packed.values():
            weight = module.weight
            assert weight.to_local().numel() <= -(-weight.numel() // world_size())
            assert weight.dtype in dtypes
        found[form] = train(model, tokens())
        model.to(torch.float16)  # float32 in between: what is stored as floats stays what it is
        for name, module in packed.items():
            whole = module.weight.full_tensor().view(torch.uint8)
            assert torch.equal(whole[: len(before[name])], before[name])
    recomputed = recomputing(pissa.wrap(llama(), r=4, quant="nf4"))
    return found | {"nf4, recomputed": train(shard(recomputed), tokens())}


def fsdp1(folder: Path) -> dict[str, Any]:
    """Losses with the older FSDP, which makes one flat parameter of a block's, of one floating dtype."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def losses(form: str) -> list[float]:
        model = pissa.wrap(llama(), r=4, **FORMS[form])
        policy, device = ModuleWrapPolicy({LlamaDecoderLayer}), torch.device("cpu")
        sharded = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
        return train(sharded, tokens())

    return {form: losses(form) for form in ("explicit", "nf4 in float32")}


def mixed_precision(folder: Path) -> dict[str, Any]:
    """Losses where FSDP computes in bfloat16; codes that it would cast are refused."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def losses(**fields: Any) -> list[float]:
        return train(shard(pissa.wrap(llama(), r=4, **fields), mp_policy=policy), tokens())

    def stored_as(storage: str) -> list[float]:
        return losses(quant="nf4", quant_storage=storage)

    return {
        "uint8": stored_as("uint8"),
        "bfloat16": stored_as("bfloat16"),
        "float32": message(lambda: stored_as("float32")),
        "embeddings": losses(target_modules=["embed_tokens", "q_proj"]),
    }


def parts_sharded_alone(folder: Path) -> dict[str, list[str]]:
    """fully_shard on a part of a layer, whose forward is not called."""
    found = {}
    for part in ("lora_A.default", "base_layer"):
        model = pissa.wrap(llama(), r=4, quant="nf4")
        for name, module in model.named_modules():
            if name.endswith(part):
                fully_shard(module)
        found[part] = message(partial(train, fully_shard(model), tokens()))
    return found


def experts(folder: Path) -> dict[str, Any]:
    """Losses of a mixture of experts, and the experts of the first block that have tokens in this process."""
    batch = tokens(columns=3)
    model = pissa.wrap(mixtral(), r=4, quant="nf4")
    router = model.get_base_model().model.layers[0].mlp.gate
    busy: set[int] = set()
    router.register_forward_hook(lambda module, args, output: busy.update(output[2].flatten().tolist()))
    found: dict[str, Any] = {"ddp": train(DistributedDataParallel(model), batch)}
    if world_size() == 3:
        unused = DistributedDataParallel(pissa.wrap(mixtral(), r=4, quant="nf4"), find_unused_parameters=True)
        found["ddp, find_unused_parameters"] = train(unused, batch)
    found["fsdp2"] = train(shard(pissa.wrap(mixtral(), r=4, quant="nf4")), batch)
    return found | {"busy": sorted(busy)}


def accelerate_fsdp2(folder: Path) -> dict[str, list[float]]:
    """Losses with accelerate's FSDP2. Accelerate offers it on accelerators only, so its state is told of it here."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    found = {}
    for form in ("implicit", "nf4", "nf4 in bfloat16"):
        accelerator = Accelerator(cpu=True)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        try:
            model = pissa.wrap(llama(), r=4, **FORMS[form])
            model, optimizer = accelerator.prepare(model, sgd(model))
            assert all(is_sharded(parameter) for parameter in model.parameters())
            found[form] = train(model, tokens(), optimizer=optimizer)
            state = accelerator.get_state_dict(model)
            model.save_pretrained(
                folder / f"accelerate-{world_size()}" / form,
                state_dict=state,
                is_main_process=accelerator.is_main_process,
            )
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    return found


# ---- Files -----------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, Any]:
    """Of a sharded model that was trained, for each form: the bits that all have gathered and rank 0 writes; whether
    this process has in memory the plain LoRA that follows from them; and whether the saved values, loaded after one
    more step, are there again. And the error where a fingerprint is asked of weights that nobody gathered, and what
    PEFT hands out."""
    found: dict[str, Any] = {}
    for form, fields in forms().items():
        model = shard(pissa.wrap(llama(), r=4, modules_to_save=["lm_head"], **fields))
        train(model, tokens(), steps=2)
        state = get_model_state_dict(model, options=ALL)
        trained_only = get_model_state_dict(model, options=replace(FULL, ignore_frozen_params=True))
        expected = get_peft_model_state_dict(model, state_dict=state)
        lora = pissa.lora_state_dict(model)
        assert any(is_sharded(parameter) for parameter in model.parameters())
        target = folder / f"saved-{world_size()}" / form
        model.save_pretrained(target, state_dict=state, is_main_process=rank() == 0)
        if rank() == 0:
            # Fingerprints are known from before the weights were sharded, or come from the gathered ones.
            model.save_pretrained(target / "trained_only", state_dict=trained_only)
            for module in model.modules():
                if isinstance(module, PissaLayer):
                    module.weight_fingerprint, module.residual_fingerprint = WeightFingerprint(), ResidualFingerprint()
            if form == "implicit":
                call = partial(model.save_pretrained, target / "refused", state_dict=trained_only)
                found["of unknown weights"] = message(call)
                found["handed out in parts"] = message(partial(get_peft_model_state_dict, model))
                found["handed out whole"] = bits(expected) == bits(load_file(target / "adapter_model.safetensors"))
            model.save_pretrained(target / "gathered", state_dict=state)
        dist.barrier()
        train(model, tokens(), steps=1)
        model.load_adapter(target, "default", is_trainable=True)
        found[form] = {
            "gathered": bits(state),
            "lora": lora.keys() == expected.keys() and bits(lora) == bits(expected),
            "loaded": bits(get_model_state_dict(model, options=ALL)) == bits(state),
        }
        assert any(is_sharded(parameter) for parameter in model.parameters())
    return found


def merged_while_sharded(folder: Path) -> dict[str, float]:
    """What TRL sends to an engine from a sharded model, merged for a while: the largest difference of logits in an
    engine that has the names of the model without adapters; infinity if the model is another one afterwards."""
    found = {}
    for form in ("nf4", "experts"):
        make = mixtral if form == "experts" else llama
        model = shard(pissa.wrap(make(), r=4, **FORMS.get(form, {})))
        train(model, tokens(), steps=1)
        before = bits(get_model_state_dict(model, options=ALL))
        model.merge_adapter()
        sent = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.full_tensor()
            for name, parameter in model.named_parameters()
            if "lora_" not in name
        }
        model.unmerge_adapter()
        engine = make(seed=1)
        engine.set_experts_implementation("eager")  # transformers' default takes no rows of 34 float32
        engine.load_state_dict(sent)  # all names, and no more
        difference = (logits(engine, tokens()) - logits(model, tokens())).abs().max().item()
        found[form] = difference if bits(get_model_state_dict(model, options=ALL)) == before else math.inf
    return found


def resumed(folder: Path) -> dict[str, list[float]]:
    """Losses of two steps: with two processes the first of a run, with three the next, from what the two have saved."""
    found = {}
    for form in ("implicit", "nf4", "nf4 in float32"):
        first = folder / "resumed-2" / form
        if world_size() == 2:
            model = pissa.wrap(llama(), r=4, **FORMS[form])
        else:
            model = PissaModel.from_pretrained(llama(), first, is_trainable=True).train()
        model = shard(model)
        optimizer = sgd(model, momentum=0.9)
        if world_size() == 3:
            state = torch.load(first / "optimizer.pt", weights_only=True)
            set_optimizer_state_dict(model, optimizer, state, options=FULL)
        found[form] = train(model, tokens(), steps=2, optimizer=optimizer)
        target = folder / f"resumed-{world_size()}" / form
        state = get_model_state_dict(model, options=FULL)
        moments = get_optimizer_state_dict(model, optimizer, options=FULL)
        model.save_pretrained(target, state_dict=state, is_main_process=rank() == 0)
        if rank() == 0:
            torch.save(moments, target / "optimizer.pt")
        dist.barrier()
    return found


def suggested(folder: Path) -> dict[str, Any]:
    """The rate that is found with each process's own data, and what ends all if one has none."""
    model = pissa.wrap(llama(), r=4)
    rows = share(tokens())
    batches = [{"input_ids": rows, "labels": rows}] * 4
    rate, _, losses = pissa.suggest_lr(model, batches)
    last = rank() == world_size() - 1
    error = message(lambda: pissa.suggest_lr(model, [] if last else batches))
    return {"rate": rate, "losses": list(losses.items()), "error": error}
