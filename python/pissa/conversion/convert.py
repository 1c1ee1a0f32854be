"""Adapters of every PiSSA layout, written as a plain LoRA for the unmodified base."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pissa.adapters.lora_folder import open_adapter, with_sizes
from pissa.adapters.peft_layout import ADAPTER_WEIGHTS, Matrices, base_weight_key
from pissa.containers.recognise import ADAPTER_CONFIG
from pissa.containers.staged import check_unused, staged, write_text
from pissa.containers.tensor_file import Scratch, write_tensors
from pissa.conversion.plain_lora import PLAIN, PlainLora
from pissa.ops.low_rank import Spectrum


@dataclass(frozen=True)
class Conversion:
    """The result of `convert`."""

    layout: str
    """The layout of the source, in words."""
    ranks: dict[str, tuple[int, int]]
    """The rank in the source and the rank that was written, by layer or by the weight of all experts in a module."""
    kept: float
    """The share of the energy ‖s (B A - B0 A0)‖² (Frobenius) of all layers that was kept."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    initial: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    progressbar: bool = False,
) -> Conversion:
    """Writes the adapter in folder `source` to `target`, a new folder, as a plain LoRA for the unmodified base.

    The layouts of `source`, in the order in which they are tried:

    - It contains pissa.json: an adapter of ours, whose LoRA is already written.
    - `initial` is given: PEFT's PiSSA (or OLoRA, CorDA), trained on W - s B0 A0. B0 and A0 are in the initial adapter,
      which was saved before training. `initial` is its folder, or the folder of a residual model that contains it in
      pissa_init, as the paper's authors do. The latter is found without `initial` if it is the `base`, or if the
      adapter's base_model_name_or_path names it: a folder, or a name that is in huggingface_hub's cache.
    - Its init_lora_weights is one that changes the base, such as "pissa": it is refused, because only the initial
      adapter says by how much.
    - Otherwise a plain LoRA, which needs `rank`. This includes what PEFT writes with
      path_initial_model_for_weight_conversion. An adapter that was trained on a residual model looks the same, unless
      its base_model_name_or_path says so; give `initial`. If that names a folder which is not here, `base` or `initial`
      has to be given. A relative name without such a folder is taken for a name on the Hub.

    The delta weight s (B A - B0 A0) is written as s [dB | B0]·[A ; dA], of rank 2r, in float32, a layer at a time.
    Other tensors (biases, magnitudes, `modules_to_save`, embeddings) stay as they are. An adapted layer's own weight,
    which PEFT saves for embeddings and output layers, becomes W. If the adapter was trained on a residual that was
    rounded (bfloat16, 4 bits), it lacks that error on the unmodified base. With `initial` it also lacks the error of A0
    and B0, which PEFT rounds as well. If input embeddings and output layer are tied, PEFT put the residual of one into
    both, which no file shows. DoRA's magnitudes belong to W + dW and are kept, even where a lower rank approximates dW.

    Args:
        source: folder of an adapter.
        target: a folder that does not exist or is empty.
        base: the model that the adapter was trained on, a folder or a name on the Hub (default: the one that the
            adapter names). Its name is written, unless it is a residual: the result is for the unmodified model.
        initial: folder of the adapter before training.
        rank: the largest rank that a layer may have; the best approximation of that rank is used.
        progressbar: show a bar on stderr.

    Raises:
        ValueError: the message names file and tensor or layer, and what is wrong. In this case nothing has been
            written.
    """
    source, target = Path(source), Path(target)
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank must be a whole number from 1 on, got {rank!r}")
    check_unused(target)
    lora = PlainLora.of(open_adapter(source), base, initial)
    folder = lora.folder
    if lora.what == PLAIN and rank is None:
        raise ValueError(
            f"{source} is a plain LoRA already. Give rank to lower it, or initial if trained on a residual [P066]"
        )

    ranks, others, energy, lost = {}, set(folder.other_keys), 0.0, 0.0
    with staged(target) as new, Scratch(target) as tensors:
        targets = folder.factors.items()
        for name, factors in tqdm(targets, desc="converting", unit="layer") if progressbar else targets:
            starts = lora.starts(name)
            exact = lora.matrices(name, starts)
            pairs, energy_of_target, lost_of_target = approximate(exact, factors.scaling, rank)
            energy, lost = energy + energy_of_target, lost + lost_of_target
            tensors.put(factors.pack(pairs))
            if (key := base_weight_key(name)) in others:
                tensors.put({key: lora.own_weight(name, starts)})
            ranks[name] = factors.rank, len(pairs[0][0])
        for key in others - tensors.keys():
            tensors.put({key: folder.weights.read(key)})
        sizes = {name: (now, folder.factors[name].scaling) for name, (_, now) in ranks.items()}
        config = with_sizes(folder.config, sizes) | {"base_model_name_or_path": lora.base_name(base)}
        write_text(new(ADAPTER_CONFIG), json.dumps(config, indent=2, sort_keys=True))
        write_tensors(new(ADAPTER_WEIGHTS), tensors)
    return Conversion(lora.what, ranks, 1 - lost / energy if energy else 1.0)


def approximate(exact: Sequence[Matrices], scaling: float, rank: int | None) -> tuple[Sequence[Matrices], float, float]:
    """The best approximations of changes s b a, of rank at most `rank`. Also returns ‖s b a‖² of all, and the part of
    it that is left out."""
    spectra = [Spectrum.of(*factors) for factors in exact]
    total = scaling**2 * sum(float(spectrum.energy[0]) for spectrum in spectra)
    if rank is None or rank >= len(exact[0][0]):
        return exact, total, 0.0
    lost = scaling**2 * sum(float(spectrum.energy[len(spectrum.values[:rank])]) for spectrum in spectra)
    return [spectrum.factors(slice(rank)) for spectrum in spectra], total, lost
