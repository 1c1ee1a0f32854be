"""Finds an adapter or a model in a folder or on the Hugging Face Hub."""

from __future__ import annotations

import glob
import inspect
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name

from pissa.containers.messages import first_line, quote
from pissa.containers.recognise import is_gguf

Name = str | os.PathLike[str]
"""A folder, a GGUF file or, as a string, the id of a repository on the Hub, with a tag (org/name:Q4_K_M) for a GGUF
file. A folder or file of that name takes precedence."""


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
    if isinstance(model_id, str) and (tagged := _TAGGED.fullmatch(model_id)) and tagged["tag"]:
        return Path(model_id, inside)  # a GGUF file, with no adapter beside it
    patterns = [glob.escape(str(PurePosixPath(inside, name))) for name in files]
    known = inspect.signature(huggingface_hub.hf_hub_download).parameters  # PEFT passes on what this takes
    options = {name: value for name, value in kwargs.items() if name in known}
    return Path(_fetch(model_id, "holds no PiSSA adapter", patterns, options), inside)


def model_files(name: Name, revision: str | None = None) -> Path:
    """The folder of a model: `name`, or the one into which huggingface_hub has fetched all but the weights. For a GGUF
    file, `name` or its path in huggingface_hub's cache, with its other parts beside it."""
    if (tagged := _TAGGED.fullmatch(str(name))) and not os.path.exists(name):
        return _gguf_file(str(name), tagged["repository"], tagged["tag"], revision)
    # gpt-oss contains its weights again for other programs.
    options = {"ignore_patterns": ["original/*", "metal/*"], "revision": revision}
    return _fetch(name, "is not a model", ["*.json", "*.jinja", "*.model", "*.txt", "*.md"], options)


def weight_files(name: Name, revision: str | None = None) -> Path:
    """The same with the weights in safetensors, those that the index names, and what `pissa init` has put beside
    them. Many repositories contain the weights again under other names."""
    from pissa.containers.tensor_file import INDEX, WEIGHTS, shards  # imports torch, which takes seconds

    folder = model_files(name, revision)
    if folder == Path(name) or is_gguf(folder):
        return folder
    weights = list(shards(folder / INDEX)) if (folder / INDEX).is_file() else [WEIGHTS]
    # The folder is called like the commit, so that both calls fetch the same.
    return _fetch(name, "is not a model", [*weights, "pissa*.safetensors", "pissa_init/*"], {"revision": folder.name})


_TAGGED = re.compile(r"(?P<repository>[^/:]+/[^/:]+)(:(?P<tag>[^/:]+)|(?<=gguf))", re.IGNORECASE)
"""The name of a repository of GGUF files, with or without what llama.cpp calls the tag of one: a part of its name."""


def _gguf_file(name: str, repository: str, tag: str | None, revision: str | None) -> Path:
    """The file with that tag, fetched with its other parts. Without a tag, it is Q4_K_M's, or the only one."""
    from pissa.containers.gguf_file import is_projector, parts_of  # imports torch, which takes seconds

    files = [file for file in _files(repository, revision) if is_gguf(Path(file)) and not is_projector(file)]
    models = {file.removesuffix(Path(file).name) + parts_of(Path(file).name)[0] for file in files}
    wanted = (tag or "Q4_K_M").lower()
    found = sorted((model for model in models if wanted in model.lower()), key=len)
    exact = [model for model in found if re.search(rf"{re.escape(wanted)}(-\d+-of-\d+)?\.gguf$", model.lower())]
    if tag is None and not found and len(models) == 1:
        found = list(models)
    if not exact and len(found) != 1:
        said = f"several files with {tag} in their names" if found else f"no GGUF file with {wanted} in its name"
        listed = ", ".join(sorted(models)) or "none"
        raise ValueError(f"{name}: the repository {repository} has {said}; it has {listed}: give org/name:TAG of one")
    chosen = PurePosixPath([*exact, *found][0])
    parts = [str(chosen.with_name(part)) for part in parts_of(chosen.name)]
    folder = _fetch(repository, "is not a model", [glob.escape(part) for part in parts], {"revision": revision})
    return folder / chosen


def _files(repository: str, revision: str | None) -> list[str]:
    """The names of the files of a repository, or of those in the cache if the Hub cannot be asked."""
    with suppress(Exception):  # its own, the system's, and those of its HTTP package
        return list(huggingface_hub.list_repo_files(repository, revision=revision))
    folder = _fetch(repository, "has no GGUF files", [], {"revision": revision})  # or the reason
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


def _fetch(model_id: Name, what: str, patterns: list[str], options: dict[str, Any]) -> Path:
    if not isinstance(model_id, str) or os.path.exists(model_id):
        return Path(model_id)
    missing = f"{quote(model_id)} {what}: there is no such folder (the working directory is {os.getcwd()})"
    try:
        return Path(huggingface_hub.snapshot_download(model_id, allow_patterns=patterns, **options))
    except Exception as error:  # its own, the system's, and those of its HTTP package
        raise ValueError(
            f"{missing}, and huggingface_hub, asked for a repository of that name, says: {first_line(error)}; "
            "needed: a folder that save_pretrained wrote, or a name on the Hub [P055]"
        ) from error


def check_is_there(name: str) -> None:
    """Raises ValueError for a name that is neither in huggingface_hub's cache nor on the Hub."""
    if not Path(huggingface_hub.constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model")).is_dir():
        _fetch(name, "is not a model", [], {})


def absolute(model_id: Name) -> str:
    """The name as it is valid in any working directory: the absolute path of a folder, or an id of the Hub as it is."""
    return os.path.abspath(model_id) if os.path.exists(model_id) else str(model_id)


def is_elsewhere(model_id: Name) -> bool:
    """Whether the name is the path of a folder that is not on this machine: there is no such folder here, and no
    repository on the Hub can be called like this."""
    if os.path.exists(model_id) or not isinstance(model_id, str):
        return not os.path.exists(model_id)
    try:
        huggingface_hub.try_to_load_from_cache(_repository(model_id), "config.json")  # checks the name
    except HFValidationError:
        return True
    return False


def _repository(model_id: str) -> str:
    """The repository in a name on the Hub."""
    tagged = _TAGGED.fullmatch(model_id)
    return tagged["repository"] if tagged else model_id


def find_file(model_id: Name, file: str) -> Path | None:
    """Finds a file of a model that is here, in a folder or in huggingface_hub's cache. Nothing is fetched."""
    if os.path.exists(model_id) or is_elsewhere(model_id):
        path = Path(model_id, file)
        return path if path.is_file() else None
    cached = huggingface_hub.try_to_load_from_cache(_repository(str(model_id)), file)
    return Path(cached) if isinstance(cached, str) else None
