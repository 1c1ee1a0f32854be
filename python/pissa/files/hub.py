"""Where an adapter is: in a folder or on the Hugging Face Hub. Options of PEFT's loading calls that we cannot honour
are refused."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from torch import nn

from pissa.files.messages import first_line, shown

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
"""The options that PEFT hands on to huggingface_hub, as far as a download of several files has them."""


def adapter_folder(
    model_id: str | os.PathLike[str], files: Iterable[str], *, subfolder: str | None = None, **kwargs: Any
) -> Path:
    """The folder of an adapter: `model_id`, or the one into which huggingface_hub has fetched the files.

    Args:
        model_id: a folder, or, as a string, the id of a repository; a folder of that name wins.
        files: the names of the files to fetch. Files that the repository lacks are left out.
        subfolder: of the folder, or of the repository.
        kwargs: options of huggingface_hub (`revision`, `token`, `cache_dir`, ...), without effect on a folder. Other
            options are ignored, as in PEFT.

    Raises:
        ValueError: the string is no folder, and huggingface_hub finds no such repository; the message has its reason.
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


def checkpoint_folder(model_id: str | os.PathLike[str]) -> Path:
    """The folder of a model in safetensors: `model_id`, or the one into which huggingface_hub has fetched it.

    Raises:
        ValueError: the string is no folder, and huggingface_hub finds no such repository; the message has its reason.
    """
    if not isinstance(model_id, str) or os.path.exists(model_id):
        return Path(model_id)
    missing = f"{shown(model_id)} is no model: there is no such folder (the working directory is {os.getcwd()})"
    try:
        folder = huggingface_hub.snapshot_download(model_id, allow_patterns=_CHECKPOINT_FILES)
    except HFValidationError as error:
        raise ValueError(f"{missing}, and a repository's name is NAME or OWNER/NAME") from error
    except Exception as error:  # as in adapter_folder
        raise ValueError(
            f"{missing}, and huggingface_hub, asked for a repository of that name, says: {first_line(error)}"
        ) from error
    return Path(folder)


_CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md"]
"""Of a model and its tokenizer, without the same weights in other formats."""


def refuse_unsupported(
    model: nn.Module,
    *,
    key_mapping: dict[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    use_auth_token: bool | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Raises ValueError for an option of PEFT's that would be ignored; the message says what to do instead."""
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
