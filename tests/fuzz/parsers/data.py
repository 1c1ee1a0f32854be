"""Training data: records of questions and answers, of messages, and of preferences, in JSON and in tables."""

from __future__ import annotations

from pathlib import Path

from pissa.cli.data import read_chats, read_preferences
from pissa.cli.sources import records
from pissa.cli.templates import Chat
from pissa.cli.terminal import UserError

FILE = "data.jsonl"


def parse(folder: Path) -> None:
    content = (folder / FILE).read_bytes()
    for suffix in (".json", ".csv"):
        (folder / "data").with_suffix(suffix).write_bytes(content)
    refused = []
    for path in (folder / FILE, folder / "data.json", folder / "data.csv"):
        for read in (read_chats, read_preferences):
            try:
                chats = read(records(str(path)))
            except UserError as error:
                refused.append((path, str(error)))
            else:
                for chat in chats:
                    for part in chat if isinstance(chat[0], Chat) else [chat]:
                        assert all(message["content"].encode() for message in part.messages)
    for path, message in refused:
        assert str(path) in message
        message.encode()
    if len(refused) == 6:
        raise ValueError(f"{FILE}: {refused[0]}")
