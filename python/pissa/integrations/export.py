"""export: a trained adapter as what another runtime loads."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from pkgutil import resolve_name

import torch

from pissa.base.bitsandbytes_state import KEPT_IN_4_BITS
from pissa.checkpoints.load import packed_layers
from pissa.checkpoints.merge import merge
from pissa.checkpoints.trained import Adapter, Ours, read_adapter
from pissa.config import IMPLICIT
from pissa.files.hub import checkpoint_folder
from pissa.files.lora_folder import open_adapter
from pissa.files.model_folder import meta_model
from pissa.files.tensor_file import Source
from pissa.integrations import RUNTIMES
from pissa.integrations.bnb4 import ResidualExport
from pissa.integrations.exported import Exported, no_base
from pissa.ops.checks import check_choice


def export(
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    base: str | os.PathLike[str] | None = None,
    initial: str | os.PathLike[str] | None = None,
    requantise: bool = False,
    progressbar: bool = False,
) -> Exported:
    """Writes the adapter in folder `adapter` to `target` for another runtime::

        pissa.export("run", "out", to="bnb4")      # QPiSSA, exactly: transformers, PEFT and bitsandbytes
        pissa.export("run", "out", to="vllm")      # a LoRA on the unmodified base
        pissa.export("run", "out.gguf", to="gguf") # the same for llama.cpp
        pissa.export("run", "out", to="merged")    # one checkpoint, dense

    "bnb4" is for an adapter with `quant="nf4"`: the residual that it was trained on, in bitsandbytes' bytes, and in the
    folder "adapter" the LoRA of rank r on it. The residual is computed from the base once more, by the start factors in
    the adapter's files, or it is that of a folder which `pissa init` has split. Fingerprints show that the base is the
    one of the training.

    "vllm" and "gguf" are LoRAs on the unmodified base, as exact as the plain LoRA in the adapter's folder is: one that
    was trained on a residual in 4 bits lacks that one's error there, and a warning says so. LoRAs of other tools are
    exported too.

    Args:
        adapter: a folder of pissa, of PEFT, or with a LoRA.
        target: a new folder; of "gguf" a new file.
        to: the runtime, of `pissa.integrations.RUNTIMES`.
        base: the model that the adapter was trained on, a folder or a name on the Hub; by default the one that the
            adapter names.
        initial: of an adapter that PEFT trained on a residual: the adapter before training; see `pissa.convert`.
        requantise: "bnb4" of an adapter whose base was not in 4 bits: it is merged and quantised, with an error.
        progressbar: one bar over the bytes of the checkpoint, on stderr.

    Raises:
        pissa.CompletedError: of "bnb4" and "merged": an earlier call with the same arguments has written all of it;
            nothing has been changed.
        ValueError: what cannot be exported, and what to do instead. Nothing has been written then, but for "bnb4" and
            "merged" perhaps an unfinished run, which the same call goes on with.
        OSError: the disk is full, or fails.
        ModuleNotFoundError: "gguf" needs the package gguf.
    """
    check_choice("to", to, tuple(RUNTIMES))
    if requantise and to != "bnb4":
        raise ValueError(f"requantise is for 'bnb4': got {to!r}; leave it out")
    opened, target = open_adapter(Path(adapter)), Path(target)
    if base is None:
        base = opened.config["base_model_name_or_path"] or None
    if to not in ("bnb4", "merged"):
        try:
            done: Exported = resolve_name(f"pissa.integrations.{to}:export_lora")(opened, base, target, initial)
            return done
        except ModuleNotFoundError as error:
            needs = f"export to {to} needs the package {error.name}, which is not installed"
            raise ModuleNotFoundError(f'{needs}: run `pip install "pissa[{to}]"`', name=error.name) from error
    if base is None:
        raise no_base(opened)
    folder = checkpoint_folder(base)
    if to == "merged" or requantise:
        quant = KEPT_IN_4_BITS if requantise else None
        merged = merge(adapter, folder, target, quant=quant, initial=initial, progressbar=progressbar)
        return Exported(
            what=merged.what,
            layers=merged.layers,
            written=f"a checkpoint with {merged.quantised} layers in {quant}" if quant else "a dense checkpoint",
            bytes_written=merged.bytes_written,
            load=f"{type(meta_model(target)).__name__}.from_pretrained({str(target)!r})",
            error=merged.error,
            worst=merged.worst,
            error_of_worst=merged.error_of_worst,
            mean_error=merged.mean_error,
        )
    with Source(folder) as source, torch.no_grad():
        found = _trained_in_4_bits(read_adapter(opened, source, initial))
        run = ResidualExport(found, target)
        run.run(progressbar)
        for doubt in found.doubts():
            warnings.warn(doubt, stacklevel=2)
        return run.exported()


def _trained_in_4_bits(found: Adapter) -> Ours:
    """The adapter, if it was trained on residuals in nf4."""
    path = found.folder.path
    forms = {record.form for record in found.records.values()} if isinstance(found, Ours) else {IMPLICIT}
    if isinstance(found, Ours) and KEPT_IN_4_BITS in {form.kind for form in forms}:
        return found
    if packed_layers(found.source.names):
        raise ValueError(
            f"{path} is a plain LoRA on {found.source.folder}, which transformers and PEFT load as they are: there is "
            "nothing to export; for one dense checkpoint export to merged"
        )
    kinds = " and ".join(sorted(form.kind for form in forms))
    raise ValueError(
        f"{path} is {found.what} on a base that was not in 4 bits ({kinds}), which 4 bits cannot hold exactly: export "
        "to merged, dense, or give requantise to merge and quantise it, with the error that is reported"
    )
