"""Repositories in the cache of the Hub, for tests without a network."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubCache:
    """A cache on disk, as huggingface_hub lays it out, which it and transformers then read."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(path))

    def put(self, name: str, folder: Path, branch: str = "main") -> str:
        """Copies a folder there as the repository of that name, and returns the name."""
        repository = self.path / f"models--{name.replace('/', '--')}"
        for made in ("refs", "blobs"):
            (repository / made).mkdir(parents=True)
        (repository / "refs" / branch).write_text(COMMIT)
        for path in (path for path in folder.rglob("*") if path.is_file()):
            data = path.read_bytes()
            blob = repository / "blobs" / hashlib.sha256(data).hexdigest()
            blob.write_bytes(data)
            link = repository / "snapshots" / COMMIT / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            if sys.platform == "win32":  # which lets only administrators make links
                link.write_bytes(data)
            else:
                link.symlink_to(os.path.relpath(blob, link.parent))
        return name
