"""Every block of code on a page runs, as a reader would run it: one after the other, in one folder."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import gguf_fixtures
import makefiles
import mixtures
import pages
from daily import each
from pissa.cli import main
from tiny_model import save_tiny_model, tiny_tokenizer

NIGHTLY = ("trainers", "troubleshooting", "large-checkpoints", "choices")
"""Pages that take half of the time, in trainings and checkpoints that other tests have, too."""
DAILY = [page for page in pages.PAGES if page.stem not in NIGHTLY]
TEXT = "text"  # what a program prints, or what needs several processes, or files that only others have
FRAGMENT = "py"  # Python that runs nowhere, "...", or in docs/situations.py


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages' examples start from."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny_model(folder / "base", max_position_embeddings=256)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "moe")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixtures.mixtral().save_pretrained(folder / "moe")
    _write(folder / "train.jsonl", [{"question": f"{i}+1", "answer": f"{i + 1}"} for i in range(40)])
    _write(
        folder / "preferences.jsonl", [{"prompt": f"{i}+1", "chosen": f"{i + 1}", "rejected": "no"} for i in range(16)]
    )
    (folder / "fragen.csv").write_text("frage;antwort\n" + "".join(f"{i}+1?;{i + 1}\n" for i in range(16)))
    (folder / "examples").mkdir()
    shutil.copy(pages.ROOT / "examples" / "tickets.csv", folder / "examples")
    command = ["finetune", "--model", str(folder / "base"), "--data", str(folder / "train.jsonl"), "--steps", "2"]
    for out, more in {"trained": [], "trained4bit": ["--quant", "nf4"]}.items():
        assert main([*command, *more, "--rank", "4", "--out", str(folder / out)]) == 0
    for copy in ("run", "adapter"):
        shutil.copytree(folder / "trained", folder / copy)
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    gguf_fixtures.write(base, "llama", folder / "model.gguf", gguf_fixtures.mixed)
    return folder


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    folder = shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.filterwarnings("default")  # pages say what warns
@pytest.mark.parametrize("page", each(pages.PAGES, DAILY), ids=pages.name_of)
def test_every_block_runs(page: Path, here: Path) -> None:
    names: dict[str, Any] = {"name": "base"}
    for language, text in pages.blocks(page):
        if language == "python":
            _python(text, names)
        elif language == "diff":
            before = "".join(line[1:] for line in text.splitlines(keepends=True) if line[0] in "- ")
            after = "".join(line[1:] for line in text.splitlines(keepends=True) if line[0] in "+ ")
            for side in (before, after):
                _python(side, names | _loaded())
        elif language == "sh":
            for line in text.replace("\\\n", "").replace(pages.MODEL, "base").splitlines():
                _command(line.partition("#")[0].strip(), here)
        else:
            assert language in (TEXT, FRAGMENT), f"{page.name}: {language!r} is no language of blocks:\n{text}"


def _python(text: str, names: dict[str, Any]) -> None:
    exec(compile(text.replace(pages.MODEL, "base"), "a block", "exec"), names)


def _loaded() -> dict[str, Any]:
    """What both sides of a difference begin with."""
    from transformers import AutoModelForCausalLM

    return {"AutoModelForCausalLM": AutoModelForCausalLM, "model": AutoModelForCausalLM.from_pretrained("base")}


def _command(line: str, here: Path) -> None:
    """A command of ours runs; one of `make` or pip names what there is."""
    words = shlex.split(line)
    if not words:
        return
    if words[0] == "pissa":
        arguments = words[1:]
        if "--out" in arguments and "--resume" not in arguments:
            # A run of the page's own, in the place of the one that was made before.
            shutil.rmtree(here / arguments[arguments.index("--out") + 1], ignore_errors=True)
        assert main(arguments) == 0, line
    elif words[0] == "make":
        assert set(words[1:]) <= makefiles.targets() | {word for word in words if "=" in word}, line
    elif words[:2] == ["pip", "install"]:
        extras = (pages.ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
        for extra in re.findall(r"\[([\w,]+)\]", line):
            assert all(re.search(rf"^{name} = ", extras, flags=re.MULTILINE) for name in extra.split(",")), line
    else:
        raise AssertionError(f"a page has a command that no test runs: {line}; mark its block as text")
