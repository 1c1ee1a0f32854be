"""The trained model as a checkpoint of its own, which transformers loads."""

from __future__ import annotations

import os
from pathlib import Path

from pissa.checkpoints.merge import merge
from pissa.files.model_folder import meta_model
from pissa.integrations.exported import Exported


def export_merged(
    adapter: Path,
    base: Path,
    target: Path,
    *,
    quant: str | None,
    initial: str | os.PathLike[str] | None,
    progressbar: bool,
) -> Exported:
    """Merges the adapter, as `checkpoints.merge`, whose arguments and errors these are."""
    done = merge(adapter, base, target, quant=quant, initial=initial, progressbar=progressbar)
    return Exported(
        what=done.what,
        layers=done.layers,
        written="a dense checkpoint" if quant is None else f"a checkpoint with {done.quantised} layers in {quant}",
        bytes_written=done.bytes_written,
        load=f"{type(meta_model(target)).__name__}.from_pretrained({str(target)!r})",
        error=done.error,
        worst=done.worst,
        error_of_worst=done.error_of_worst,
        mean_error=done.mean_error,
    )
