"""A model that `pissa init` has split: a run trains what its folder says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pissa.cli.terminal import UserError, silence_third_parties

RECORD = "pissa.json"
"""`files.pissa_layout.PISSA_RECORD`, whose module takes seconds to import."""


def is_split(model: str) -> bool:
    """Whether `--model` is such a folder."""
    return (Path(model) / RECORD).is_file() and (Path(model) / "config.json").is_file()


def settle(args: argparse.Namespace) -> None:
    """Fills in the arguments that a run leaves open: from the folder if its model is split, else the usual ones.

    Raises:
        UserError: the folder says otherwise than an argument that was given, or is damaged.
    """
    usual, settled = dict(_USUAL), dict[str, Any]()
    if is_split(args.model):
        settled = _of_folder(Path(args.model))
        usual |= settled | {"dtype": _dtype(Path(args.model))}
        if args.method == "lora":
            raise UserError(
                f"--method lora: {args.model} holds residuals, which lack what PiSSA starts from; give the model that "
                "was split"
            )
    for name, value in usual.items():
        given = getattr(args, name)
        if name in settled and given not in (None, value):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} {given}: {args.model} was split with {option} {value}; leave {option} out")
        setattr(args, name, value if given is None else given)


_USUAL: dict[str, Any] = {
    **{"quant": None, "quant_iters": 1, "rank": 16, "svd": "krylov", "svd_passes": "auto"},
    "dtype": "float32",
}
"""What a run takes unless it is told otherwise."""


def _of_folder(folder: Path) -> dict[str, Any]:
    silence_third_parties()
    from pissa.files.record import AdapterRecord

    try:
        config = AdapterRecord.read(folder / RECORD).config
    except ValueError as error:
        raise UserError(f"--model {folder}: {error}") from error
    names = {"quant": "quant", "quant_iters": "quant_iters", "rank": "r", "svd": "svd", "svd_passes": "svd_passes"}
    return {name: getattr(config, field) for name, field in names.items()}


def _dtype(folder: Path) -> str:
    """The dtype of what is not packed."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: config.json cannot be read: {error}") from error
    found: str = config.get("dtype") or config.get("torch_dtype") or "float32"
    return found
