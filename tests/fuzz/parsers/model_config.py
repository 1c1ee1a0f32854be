"""config.json of a model: as transformers takes it, and as we copy it."""

from __future__ import annotations

from pathlib import Path

from pissa.containers.checkpoint import ModelFolder
from pissa.containers.model_folder import class_of, model_config

FILE = "config.json"


def parse(folder: Path) -> None:
    config = model_config(folder)
    ModelFolder(folder)
    try:
        class_of(config)
    except ValueError as error:
        raise ValueError(f"{FILE}: {error}") from error  # as meta_model, which builds the class, names the file
