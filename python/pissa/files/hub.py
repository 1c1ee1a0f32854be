"""What PEFT's loading calls take besides the model: where an adapter is, in a folder or on the Hugging Face Hub, and
options, some of which cannot be honoured here."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from torch import nn

from pissa.files.json_file import shown

_HUB_OPTIONS = (
    "revision",
    "token",
    "cache_dir",
    "force_download",
    "local_files_only",
    "local_dir",
    "repo_type",
    "endpoint",
    "headers",
    "etag_timeout",
    "user_agent",
)
"""Of the options that PEFT hands on to huggingface_hub, those that a download of several files has as well."""


def adapter_folder(
    model_id: str | os.PathLike[str], files: Iterable[str], *, subfolder: str | None = None, **kwargs: Any
) -> Path:
    """The folder of an adapter: `model_id`, or where huggingface_hub has put what it fetched of that repository.

    Args:
        model_id: a folder, which always wins; or, as a string, the id of a repository.
        files: names of the files that are fetched if they are there; no others are.
        subfolder: of the folder, or of the repository.
        kwargs: options of huggingface_hub (`revision`, `token`, `cache_dir`, ...), of no use with a folder; others are
            ignored, as PEFT does.

    Raises:
        ValueError: a string that is no folder, and of which huggingface_hub gives nothing, with its reason.
    """
    inside = subfolder or ""
    if not isinstance(model_id, str) or os.path.exists(model_id):
        return Path(model_id, inside)
    options = {name: value for name, value in kwargs.items() if name in _HUB_OPTIONS}
    patterns = [glob.escape(str(PurePosixPath(inside, name))) for name in files]
    try:
        folder = huggingface_hub.snapshot_download(model_id, allow_patterns=patterns, **options)
    except Exception as error:  # its own, the system's, and those of the package that it speaks HTTP with
        raise ValueError(
            f"{shown(model_id)} holds no PiSSA adapter: there is no such folder (the working directory is "
            f"{os.getcwd()}), and huggingface_hub, asked for a repository of that name, says: {error}"
        ) from error
    return Path(folder, inside)


def refuse_unsupported(
    model: nn.Module,
    *,
    key_mapping: dict[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    use_auth_token: bool | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Raises ValueError, with what to do instead, for an option of PEFT's that would be ignored otherwise."""
    if key_mapping:
        raise ValueError(
            f"key_mapping={shown(key_mapping)} is not supported: an adapter is restored into layers of the names that "
            "it was saved with. Use peft.PeftModel.from_pretrained with key_mapping, for which the folder is a plain "
            "LoRA"
        )
    if ignore_mismatched_sizes:
        raise ValueError(
            "ignore_mismatched_sizes=True is not supported: an adapter is restored as a whole. Load the base that it "
            "was trained on, or use peft.PeftModel.from_pretrained, for which the folder is a plain LoRA"
        )
    if use_auth_token:
        raise ValueError("use_auth_token is not supported, huggingface_hub has dropped it: use token")
    places = getattr(model, "hf_device_map", None) or {}
    if isinstance(device_map, dict) and device_map != places and {"cpu", "disk"} & set(places.values()):
        raise ValueError(
            "device_map is not supported for an offloaded model, which stays where it is: give the device_map to the "
            "from_pretrained of the base, or to accelerate.dispatch_model, before the adapter is loaded"
        )
