"""A LoRA that vLLM loads: with one rank and scaling, and with separate experts, under the names of the checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from pissa.adapters.lora_folder import LoraFactors, LoraFolder, with_sizes
from pissa.adapters.peft_layout import ADAPTER_WEIGHTS, FACTOR_KEYS, PREFIX, Matrices
from pissa.checkpoints.merge import UnitPlanner
from pissa.checkpoints.rewrite import LayerPlan
from pissa.containers.checkpoint import Checkpoint
from pissa.containers.hub import Name
from pissa.containers.messages import quote
from pissa.containers.recognise import ADAPTER_CONFIG
from pissa.containers.staged import check_unused, staged, write_text
from pissa.containers.tensor_file import Scratch, write_tensors
from pissa.conversion.plain_lora import PlainLora
from pissa.integrations.exported import MERGE, Exported, read_factors
from pissa.ops.low_rank import pad_rank
from pissa.system import shell

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The allowed values of vLLM's --max-lora-rank."""

_STACKED = ("gpt_oss", "interns1_pro", "qwen3_5_moe", "qwen3_omni_moe", "qwen3_vl_moe")
"""The model types whose experts vLLM stores as a stack. It reads their factors in PEFT's own layout."""

Places = list[list[tuple[str, int]]]
"""For each layer of a target, the modules of the checkpoint of which it consists, stacked by rows: names and rows."""


def export_lora(adapter: LoraFolder, base: Name | None, target: Path) -> Exported:
    """Writes the adapter to the new folder `target`, a layer at a time.

    vLLM names experts as the checkpoint does, each separately and with gate and up apart. Therefore the factors of
    fused experts are split like the base's checkpoint. All layers get the largest rank, padded with zeros, and one
    scaling, because earlier versions of vLLM support nothing else. Raises ValueError for anything that vLLM does not
    take from an adapter, which is named.
    """
    check_unused(target)
    lora = read_factors(adapter, base, "vLLM")
    rank = max(lora.rank(name) for name in lora.folder.factors)
    allowed = [number for number in RANKS if number >= rank]
    if not allowed:
        raise ValueError(
            f"{adapter.path} has rank {rank} as a LoRA; vLLM allows {RANKS[-1]}: lower it with pissa convert --rank "
            f"{RANKS[-1]} [P119]"
        )
    places, model = _places(lora, base or adapter.named_base), lora.base_name(base)
    with staged(target) as new, Scratch(target) as tensors:
        for name, factors in lora.folder.factors.items():
            pairs = [pad_rank(a, factors.scaling / lora.scaling * b, rank) for a, b in lora.matrices(name)]
            tensors.put(_tensors(factors, pairs, places.get(name)))
        sizes = dict.fromkeys(lora.folder.factors, (rank, lora.scaling))
        config = with_sizes({**lora.folder.config, "use_rslora": False}, sizes) | {
            "target_modules": sorted({key.split(".lora_")[0].rpartition(".")[2] for key in tensors}),
            **dict.fromkeys(("target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")),
            "base_model_name_or_path": model,
        }
        write_text(new(ADAPTER_CONFIG), json.dumps(config, indent=2, sort_keys=True))
        write_tensors(new(ADAPTER_WEIGHTS), tensors)
        count = len(tensors) // 2
    return Exported(
        what=lora.what,
        layers=lora.layers,
        written=f"a LoRA of rank {rank}, {count} pairs of factors",
        bytes_written=sum(path.stat().st_size for path in target.iterdir()),
        load=f"vllm serve {shell(model or 'BASE')} --enable-lora --max-lora-rank {allowed[0]} --lora-modules "
        + shell(f"NAME={target}"),
    )


def _tensors(factors: LoraFactors, pairs: list[Matrices], places: Places | None) -> dict[str, Tensor]:
    """The tensors of a target, under vLLM's names; if `places` is None, under the adapter's names."""
    if places is None:
        return factors.pack(pairs)
    tensors = {}
    for parts, (a, b) in zip(places, pairs, strict=True):
        for (place, _), rows in zip(parts, torch.split(b, [count for _, count in parts]), strict=True):
            for key, tensor in zip(FACTOR_KEYS[0], (a, rows), strict=True):
                tensors[f"{PREFIX}{place}.{key}"] = tensor.float().contiguous()
    return tensors


def _places(lora: PlainLora, base: Name | None) -> dict[str, Places]:
    """The places of targets that vLLM may name differently from the adapter, if it has fused experts."""
    all_factors, path = lora.folder.factors, lora.folder.weights.path
    for target, factors in all_factors.items():
        if len(factors.row) > 1:
            raise ValueError(f"layer {target} is a convolution, for which vLLM takes no adapter: run {MERGE} [P120]")
    fused = {target for target, factors in all_factors.items() if factors.is_fused}
    if not fused:
        return {}
    if base is None:
        raise ValueError(
            f"{path} has factors of fused experts, {min(fused)} the first, which vLLM names as the checkpoint of the "
            "base does: give the unmodified model (base) [P121]"
        )
    source = Checkpoint.open(base)
    planner = UnitPlanner(source, lora.folder)
    layers = {
        target: planner.unit_of(factors).layers for target, factors in all_factors.items() if not factors.is_embedding
    }
    stacked = {target for target in fused if layers[target][0].parts[0].member is not None}
    model_type = source.model.config.model_type
    if stacked and model_type not in _STACKED:
        raise ValueError(
            f"the checkpoint in {source.folder} has {min(stacked)} as a stack, whose factors vLLM reads for "
            f"{', '.join(_STACKED)}, not for {model_type}: run {MERGE} [P121]"
        )
    modules = Counter(target.rpartition(".")[0] for target in stacked)
    for module, leaf in (target.rpartition(".")[::2] for target in sorted(stacked)):
        if modules[module] == 1:
            raise ValueError(
                f"{path} has factors of only {quote(leaf)} in {module}: of a stack of experts vLLM takes "
                f"both gate_up_proj and down_proj, or neither; run {MERGE} [P121]"
            )
    return {target: [_parts(layer, source) for layer in layers[target]] for target in layers.keys() - stacked}


def _parts(layer: LayerPlan, source: Checkpoint) -> list[tuple[str, int]]:
    rows = [source.entry(part.tensor).shape[0] for part in layer.parts] if len(layer.parts) > 1 else [layer.shape[0]]
    return [(part.tensor.removesuffix(".weight"), count) for part, count in zip(layer.parts, rows, strict=True)]
