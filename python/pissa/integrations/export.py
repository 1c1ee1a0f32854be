"""export: writes a trained adapter for another runtime."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from pkgutil import resolve_name

import torch

from pissa.adapters.lora_folder import open_adapter
from pissa.base.bitsandbytes_state import KEPT_IN_4_BITS
from pissa.checkpoints.trained import Ours, TrainedWeights, read_adapter
from pissa.config import IMPLICIT
from pissa.containers.checkpoint import AS_STORED, READ, Checkpoint
from pissa.integrations import RUNTIMES
from pissa.integrations.bnb4 import ResidualExport
from pissa.integrations.exported import MERGE, Exported, no_base
from pissa.model.batches import Batch
from pissa.ops.checks import check_choice


def export(
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    base: str | os.PathLike[str] | None = None,
    calibration: Iterable[Batch] | None = None,
    type: str | None = None,
    progressbar: bool = False,
) -> Exported:
    """Writes the adapter in folder `adapter` to `target` for another runtime::

        pissa.export("run", "out", to="bnb4")      # QPiSSA, exactly: transformers, PEFT and bitsandbytes
        pissa.export("run", "out", to="vllm")      # a LoRA on the unmodified base
        pissa.export("run", "out.gguf", to="gguf") # the same for llama.cpp
        pissa.export("run", "merged.gguf", to="gguf-model")  # one file, with the adapter in it

    "bnb4" is for an adapter with `quant="nf4"`. It writes the residual on which the adapter was trained, in
    bitsandbytes' layout, and in the folder "adapter" the LoRA of rank r on it. The residual is computed again from the
    base, with the start factors in the adapter's files, or it is that of a folder which `pissa init` has split.
    Fingerprints show that the base is the one of the training.

    "vllm" and "gguf" write LoRAs for the unmodified base, which are as exact as the plain LoRA in the adapter's folder.
    If the adapter was trained on a 4-bit residual, the LoRA lacks the residual's error there, and a warning says so.
    LoRAs of other tools can be exported too.

    "gguf-model" writes a GGUF base's file again, with the adapter in it: codes change, rounded at random
    (`ops.merge_codes`), and scales and everything else stay, except for the name and a note in the metadata. Of any
    other base it writes the merged model as a new file, in the dtype of its weights or in codes of a `type`.

    Args:
        adapter: a folder of pissa or of PEFT, or a folder with a LoRA.
        target: a new folder, or a new file for "gguf" and "gguf-model".
        to: the runtime, one of `pissa.integrations.RUNTIMES`.
        base: the model that the adapter was trained on, a folder, a GGUF file or a name on the Hub (default: the one
            that the adapter names). For "gguf": the GGUF file with which llama.cpp runs the adapter.
        calibration: for "gguf-model": batches of what the model will read, for error feedback as in `pissa.merge`.
        type: for "gguf-model" of a base that is no GGUF file: "q8_0" writes matrices in 8 bits, rounded to the nearest
            (default: in the dtype of the base).
        progressbar: show one bar over the bytes of the checkpoint on stderr.

    Raises:
        pissa.CompletedError: for "bnb4": an earlier call with the same arguments has written everything;
            nothing has been changed.
        ValueError: the adapter cannot be exported; the message says what to do instead. Then nothing has been written,
            except perhaps an unfinished run for "bnb4", which the same call continues.
        OSError: the disk is full or fails.
    """
    check_choice("to", to, tuple(RUNTIMES))
    others = {"calibration": calibration, "type": type}
    others = {name: value for name, value in others.items() if value is not None}
    if others and to != "gguf-model":
        [name, *_] = others
        raise ValueError(f'{name}: got one, and to={to!r}; it is for to="gguf-model": leave it out')
    opened, target = open_adapter(Path(adapter)), Path(target)
    if to in _EXPORTERS:
        done: Exported = resolve_name(f"pissa.integrations.{_EXPORTERS[to]}")(opened, base, target, **others)
        return done
    base = base or opened.named_base
    if base is None:
        raise no_base(opened)
    with torch.no_grad():
        source = Checkpoint.open(base)
        source.require(*READ)
        trained = _require_4_bits(read_adapter(opened, source))
        run = ResidualExport(trained, Path(os.path.abspath(target)))
        run.run(progressbar)
        for doubt in trained.doubts():
            warnings.warn(doubt, stacklevel=2)
        return run.exported()


_EXPORTERS = {"vllm": "vllm:export_lora", "gguf": "gguf:export_lora", "gguf-model": "merged_gguf:export_model"}
"""The functions that take an adapter, its base and the target."""


def _require_4_bits(adapter: TrainedWeights) -> Ours:
    """Returns the adapter, if it was trained on nf4 residuals."""
    path = adapter.folder.path
    forms = {record.form for record in adapter.ours.layers.values()} if isinstance(adapter, Ours) else {IMPLICIT}
    if isinstance(adapter, Ours) and KEPT_IN_4_BITS in {form.name for form in forms}:
        return adapter
    if adapter.source.coded and adapter.source.contents not in AS_STORED:
        raise ValueError(
            f"{path} is a plain LoRA on {adapter.source.folder}, which transformers and PEFT load as they are: there "
            f"is nothing to export; for one dense checkpoint run {MERGE} [P118]"
        )
    names = " and ".join(sorted(form.name for form in forms))
    raise ValueError(
        f"{path} is {adapter.what} on a base that was not in 4 bits ({names}), which 4 bits cannot hold exactly: "
        f"run {MERGE}, and with --quant {KEPT_IN_4_BITS} for a model in 4 bits, with the error that is reported [P117]"
    )
