"""Finds an adapter or a model in a folder or on the Hugging Face Hub."""

from __future__ import annotations

import glob
import inspect
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from pissa.containers.messages import first_line, quote
from pissa.containers.tensor_file import INDEX, WEIGHTS, shards

Name = str | os.PathLike[str]
"""A folder or, as a string, the id of a repository on the Hub. A folder of that name takes precedence."""


def adapter_folder(model_id: Name, files: Iterable[str], *, subfolder: str | None = None, **kwargs: Any) -> Path:
    """Returns the folder of an adapter: `model_id`, or the folder into which huggingface_hub has fetched the files.

    Args:
        files: the names of the files to fetch. Files that the repository lacks are left out.
        subfolder: a sub-folder of the folder or repository.
        kwargs: options of huggingface_hub (`revision`, `token`, `cache_dir`, ...), without effect on a folder. Other
            options are ignored, as in PEFT.

    Raises:
        ValueError: the string is not a folder, and huggingface_hub finds no such repository; the message gives its
            reason.
    """
    inside = subfolder or ""
    patterns = [glob.escape(str(PurePosixPath(inside, name))) for name in files]
    known = inspect.signature(huggingface_hub.hf_hub_download).parameters  # PEFT passes on what this takes
    options = {name: value for name, value in kwargs.items() if name in known}
    return Path(_fetch(model_id, "holds no PiSSA adapter", patterns, options), inside)


def model_files(name: Name, revision: str | None = None) -> Path:
    """The folder of a model: `name`, or the one into which huggingface_hub has fetched all but the weights."""
    # gpt-oss contains its weights again for other programs.
    options = {"ignore_patterns": ["original/*", "metal/*"], "revision": revision}
    return _fetch(name, "is not a model", ["*.json", "*.jinja", "*.model", "*.txt", "*.md"], options)


def weight_files(name: Name, revision: str | None = None) -> Path:
    """The same with the weights in safetensors, those that the index names, and what `pissa init` has put beside
    them. Many repositories contain the weights again under other names."""
    folder = model_files(name, revision)
    if folder == Path(name):
        return folder
    weights = list(shards(folder / INDEX)) if (folder / INDEX).is_file() else [WEIGHTS]
    # The folder is called like the commit, so that both calls fetch the same.
    return _fetch(name, "is not a model", [*weights, "pissa*.safetensors", "pissa_init/*"], {"revision": folder.name})


def _fetch(model_id: Name, what: str, patterns: list[str], options: dict[str, Any]) -> Path:
    if not isinstance(model_id, str) or os.path.exists(model_id):
        return Path(model_id)
    missing = f"{quote(model_id)} {what}: there is no such folder (the working directory is {os.getcwd()})"
    try:
        return Path(huggingface_hub.snapshot_download(model_id, allow_patterns=patterns, **options))
    except Exception as error:  # its own, the system's, and those of its HTTP package
        raise ValueError(
            f"{missing}, and huggingface_hub, asked for a repository of that name, says: {first_line(error)}; "
            "needed: a folder that save_pretrained wrote, or a name on the Hub"
        ) from error


def absolute(model_id: Name) -> str:
    """The name as it is valid in any working directory: the absolute path of a folder, or an id of the Hub as it is."""
    return os.path.abspath(model_id) if os.path.exists(model_id) else str(model_id)


def is_elsewhere(model_id: Name) -> bool:
    """Whether the name is the path of a folder that is not on this machine: there is no such folder here, and no
    repository on the Hub can be called like this."""
    if os.path.exists(model_id) or not isinstance(model_id, str):
        return not os.path.exists(model_id)
    try:
        huggingface_hub.try_to_load_from_cache(model_id, "config.json")  # checks the name
    except HFValidationError:
        return True
    return False


def find_file(model_id: Name, file: str) -> Path | None:
    """Finds a file of a model that is here, in a folder or in huggingface_hub's cache. Nothing is fetched."""
    if os.path.exists(model_id) or is_elsewhere(model_id):
        path = Path(model_id, file)
        return path if path.is_file() else None
    cached = huggingface_hub.try_to_load_from_cache(str(model_id), file)
    return Path(cached) if isinstance(cached, str) else None
