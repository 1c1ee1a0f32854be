"""`pissa chat`: what reaches the model and the screen, for each kind of folder; in a terminal and through pipes."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import pissa
from language_models import train
from pissa.cli import main
from released_folders import release
from runs import Terminal, command, refused
from tiny_model import save_tiny_model, tiny_tokenizer

LONG = {"max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small model with room for long answers, which does not end them by itself."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base", **LONG)


@pytest.fixture(scope="module")
def ran(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(command("finetune", base, data, out, "--rank", "4")) == 0
    return out


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a LoRA that PEFT has trained on it."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
    train(model, torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(folder := tmp_path_factory.mktemp("lora"))
    return folder


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Asks one question; returns the answer on stdout, and what stderr says."""

    def one(folder: Path, *more: str, prompt: str = "17+1") -> tuple[str, str]:
        arguments = ["chat", str(folder), "--prompt", prompt, "--temperature", "0", "--max-tokens", "8", *more]
        assert main(arguments) == 0
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    return one


def answer(model: Any, folder: Path, *messages: str, **options: Any) -> str:
    """What a model answers by transformers' own means to these messages, the first and last of which are the user's."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    found = model.generate(**tokens, **{"max_new_tokens": 8, "do_sample": False, **options})
    text: str = tokenizer.decode(found[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


# ---- Each kind of folder ---------------------------------------------------------------------------------------------


def test_a_run_answers_as_its_adapter_does_on_its_base(
    base: Path, ran: Path, ask: Callable[..., tuple[str, str]]
) -> None:
    out, err = ask(ran)
    model = AutoModelForCausalLM.from_pretrained(base)
    before = answer(model, base, "17+1")
    expected = answer(pissa.PissaModel.from_pretrained(model, ran), base, "17+1")
    assert expected != before
    assert out == f"{expected}\n"
    first, last = err.splitlines()[-2:]
    assert first == f"model     {base}, float32, with {ran}"
    assert re.fullmatch(r"\(\d tokens, [\d.]+ a second\)", last)
    out, err = ask(ran, "--compare")
    assert out == f"--- base\n{before}\n--- {ran}\n{expected}\n"
    assert re.search(r"\(8 tokens, [\d.]+ a second; cut: --max-tokens\)\n", err)


def test_a_lora_of_peft_answers_on_its_base(base: Path, lora: Path, ask: Callable[..., tuple[str, str]]) -> None:
    from peft import PeftModel

    before = answer(AutoModelForCausalLM.from_pretrained(base), base, "17+1")
    expected = answer(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora), base, "17+1")
    out, _ = ask(lora, "--compare")
    assert out == f"--- base\n{before}\n--- {lora}\n{expected}\n"


def test_a_run_is_compared_whatever_its_folder_is_called(
    ran: Path, tmp_path: Path, ask: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask(ran, "--compare")[0].replace(str(ran), "base")
    shutil.copytree(ran, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert ask(Path("base"), "--compare")[0] == expected


def test_models_answer(base: Path, tmp_path: Path, ask: Callable[..., tuple[str, str]]) -> None:
    expected = answer(AutoModelForCausalLM.from_pretrained(base), base, "17+1")
    assert ask(base)[0] == f"{expected}\n"
    assert main(["init", str(base), str(tmp_path / "split"), "--rank", "4", "--quant", "nf4"]) == 0
    split = pissa.load(tmp_path / "split", is_trainable=False)
    assert ask(tmp_path / "split")[0].endswith(f"{answer(split, base, '17+1')}\n")


def test_released_models_answer_with_and_without_an_adapter(
    base: Path, data: Path, lora: Path, tmp_path: Path, ask: Callable[..., tuple[str, str]]
) -> None:
    folder, out = tmp_path / "released", tmp_path / "run"
    shutil.copytree(
        base, folder, ignore=lambda _, names: [n for n in names if n in ("model.safetensors", "config.json")]
    )
    release(AutoModelForCausalLM.from_pretrained(base), "fp8-tiles", folder)
    model = pissa.load(folder, r=1, init="lora", is_trainable=False)
    before = answer(model, base, "17+1")
    assert ask(folder)[0] == f"{before}\n"
    model.load_adapter(lora, "other")
    model.set_adapter("other")
    assert ask(lora, "--base", str(folder), "--compare")[0] == (
        f"--- base\n{before}\n--- {lora}\n{answer(model, base, '17+1')}\n"
    )
    assert main(command("finetune", folder, data, out, "--rank", "4")) == 0
    assert ask(out)[0].endswith(f"{answer(pissa.load(folder, adapter=out, is_trainable=False), base, '17+1')}\n")


def test_a_residual_of_peft_answers_but_is_not_the_base(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ask: Callable[..., tuple[str, str]]
) -> None:
    split = tmp_path / "split"
    assert main(["init", str(base), str(split), "--rank", "4"]) == 0
    initial = split / "pissa_init"
    expected = answer(AutoModelForCausalLM.from_pretrained(base), base, "17+1")
    assert ask(initial, "--base", str(split))[0].endswith(f"{expected}\n")
    message = refused(["chat", str(initial), "--prompt", "1", "--base", str(split), "--compare"], capsys)
    assert "was trained on a residual, which is not the base" in message


# ---- What reaches the model ------------------------------------------------------------------------------------------


@contextmanager
def generations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Collects what `generate` is given: the prompt's text, and the options."""
    given: list[tuple[str, dict[str, Any]]] = []
    real = LlamaForCausalLM.generate

    def generate(self: Any, *args: Any, **options: Any) -> Any:
        given.append((options["streamer"].tokenizer.decode(options["input_ids"][0]), options))
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "generate", generate)
        yield given


def test_a_conversation_is_remembered_until_it_begins_anew(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("one\n\n  \ntwo\n/new\nthree\n/quit\nfour\n"))
    with generations(monkeypatch) as given:
        assert main(["chat", str(base), "--system", "Count.", "--max-tokens", "4", "--temperature", "0"]) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert [prompt for prompt, _ in given] == [
        "s:Count.</s>u:one</s>a:",
        f"s:Count.</s>u:one</s>a:{first}</s>u:two</s>a:",
        "s:Count.</s>u:three</s>a:",
    ]


def test_a_compared_base_remembers_its_own_answers(
    base: Path, ran: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("one\ntwo\n"))
    with generations(monkeypatch) as given:
        assert main(["chat", str(ran), "--compare", "--max-tokens", "8", "--temperature", "0"]) == 0
    answers = re.findall(r"--- .*\n(.*)\n", capsys.readouterr().out)
    assert answers[0] != answers[1]
    assert [prompt for prompt, _ in given[2:]] == [f"u:one</s>a:{said}</s>u:two</s>a:" for said in answers[:2]]


def test_the_temperature_chooses_between_the_models_own_way_greedy_and_sampling(
    base: Path, ask: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with generations(monkeypatch) as given:
        ask(base)
        ask(base, "--temperature", "0.5")
        assert main(["chat", str(base), "--prompt", "1", "--max-tokens", "1"]) == 0
    sampling = [{key: o[key] for key in ("do_sample", "temperature") if key in o} for _, o in given]
    assert sampling == [{"do_sample": False, "temperature": None}, {"do_sample": True, "temperature": 0.5}, {}]


def test_the_stop_token_of_training_ends_an_answer(
    base: Path, tmp_path: Path, ask: Callable[..., tuple[str, str]]
) -> None:
    """The template ends turns with a token that generation_config.json does not know."""
    folder, tokenizer = shutil.copytree(base, tmp_path / "model"), AutoTokenizer.from_pretrained(base)
    question = tokenizer("u:17+1</s>a:", return_tensors="pt").input_ids
    found = AutoModelForCausalLM.from_pretrained(base).generate(question, max_new_tokens=8, do_sample=False)
    said = tokenizer.convert_ids_to_tokens(found[0, question.shape[1] :])
    tokenizer.add_special_tokens({"extra_special_tokens": [said[2]]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{{ '</s>' if m['role'] == 'user' else '"
        + said[2]
        + "' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    assert said[2] not in said[:2]
    assert "(3 tokens, " in ask(folder)[1]


def test_a_text_is_continued_where_there_is_no_template(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    monkeypatch.setattr(sys, "stdin", Terminal("one\ntwo\n"))
    with generations(monkeypatch) as given:
        assert main(["chat", str(folder), "--max-tokens", "2"]) == 0
    assert [prompt for prompt, _ in given] == ["one", "two"]
    assert capsys.readouterr().err.count("has no chat template: each text is continued, without the others") == 1
    message = refused(["chat", str(folder), "--prompt", "one", "--system", "Count."], capsys)
    assert "--system: the tokenizer has no chat template" in message


def test_a_full_context_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = save_tiny_model(tmp_path / "small", max_position_embeddings=16)
    monkeypatch.setattr(sys, "stdin", Terminal("one\ntwo\n/new\nthree\n"))
    assert main(["chat", str(small), "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert captured.err.count("cut: the model's context is full; /new begins anew") == 2
    assert "and the model reads at most 16, with the answer; begin a new one with /new" in captured.err


# ---- Terminals and pipes ---------------------------------------------------------------------------------------------


def started(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pissa", "chat", *arguments]


class Screen:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # `make test &` in a script ignores it
            os.execve(sys.executable, started(*arguments), {**os.environ, "TERM": "dumb"})

    def read_until(self, pattern: str, seconds: float = 60) -> str:
        """Reads until the text since the last call matches, and returns it."""
        text, end = "", time.monotonic() + seconds
        while not re.search(pattern, text):
            assert select.select([self.terminal], [], [], end - time.monotonic())[0], f"no {pattern!r} in {text!r}"
            try:
                text += os.read(self.terminal, 1).decode(errors="replace")
            except OSError:  # how Linux reports the end
                break
        return text

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def interrupt(self) -> int:
        """The exit code after Ctrl-C, which is pressed again if readline missed it, because it was not waiting yet."""
        self.type("\x03")
        if not select.select([self.terminal], [], [], 10)[0]:
            self.type("\x03")
        return self.exit_code()

    def exit_code(self) -> int:
        self.read_until("a^")  # until the end
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_an_answer_is_streamed_and_stopped_in_a_terminal(base: Path, tmp_path: Path) -> None:
    folder, tokenizer = shutil.copytree(base, tmp_path / "model"), AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():  # it answers in letters, and does not end
        letters = tokenizer.convert_tokens_to_ids([*string.ascii_lowercase])
        model.lm_head.weight *= torch.zeros(len(model.lm_head.weight), 1).index_fill(0, torch.tensor(letters), 1)
    model.save_pretrained(folder)
    screen = Screen(str(folder), "--max-tokens", "4000", "--temperature", "0")
    assert "Ctrl-C stops an answer" in screen.read_until("> $")
    screen.type("17+1\n")
    screen.read_until("17\\+1\r\n[a-z]{9}")  # it has begun
    screen.type("\x03")
    assert "; stopped)" in screen.read_until("a second.*\\)\r\n> $")  # it had not ended by itself
    screen.type("and then?\n")
    screen.read_until("and then\\?\r\n[a-z]{9}")
    screen.type("\x03")
    screen.read_until("; stopped\\)\r\n> $")
    assert screen.interrupt() == 130
    again = Screen(str(folder))
    again.read_until("> $")
    again.type("\x04")
    assert again.exit_code() == 0


def test_a_pipe_brings_one_prompt_and_gets_the_answer_only(ran: Path, ask: Callable[..., tuple[str, str]]) -> None:
    expected, _ = ask(ran, prompt="17\n+1")
    options = ["--max-tokens", "8", "--temperature", "0"]
    done = subprocess.run(started(str(ran), *options), input="17\n+1\n", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, expected)
    assert "Warning" not in done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("note      other programs")]
    assert len(said) == 2  # the model, and the speed


NOT_UTF8 = b"caf\xe9?"


@pytest.mark.parametrize("options", [[], ["--prompt", NOT_UTF8], ["--prompt", "1", "--system", NOT_UTF8]])
def test_what_is_not_utf8_is_refused(base: Path, options: list[str | bytes]) -> None:
    arguments = [*started(str(base), "--max-tokens", "2"), *options]
    done = subprocess.run(arguments, input=NOT_UTF8, capture_output=True, env=os.environ | {"LC_ALL": "C.UTF-8"})
    assert (done.returncode, done.stdout) == (2, b"")
    assert re.fullmatch(rb"pissa chat: the text cannot be read: .*; needed: UTF-8, and a locale .*\n", done.stderr)


def test_a_line_that_is_not_utf8_does_not_end_a_conversation(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("caf\udce9?\none\n"))
    with generations(monkeypatch) as given:
        assert main(["chat", str(base), "--max-tokens", "2"]) == 0
    assert [prompt for prompt, _ in given] == ["u:one</s>a:"]
    assert "the text cannot be read: " in capsys.readouterr().err


def test_several_prompts_are_answered_each_by_itself(ran: Path, ask: Callable[..., tuple[str, str]]) -> None:
    answers = [ask(ran, prompt=prompt)[0] for prompt in ("17+1", "3+1")]
    assert ask(ran, "--prompt", "3+1", prompt="17+1")[0] == "".join(answers)


# ---- Refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_asked_is_refused(
    base: Path, ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--prompt", "1"]
    assert "no such file or folder" in refused(["chat", str(tmp_path / "no"), *asked], capsys)
    message = refused(["chat", str(tmp_path), *asked], capsys)
    assert message.endswith(
        "; there is no adapter either: a run that has not ended has it in its last checkpoint-N [P113]"
    )
    initial = shutil.copytree(base, tmp_path / "residual") / "pissa_init"
    initial.mkdir()
    (initial / "adapter_config.json").write_text("{}")
    assert "it lacks that adapter" in refused(["chat", str(initial.parent), *asked], capsys)
    assert f"--compare: {base} has no adapter" in refused(["chat", str(base), *asked, "--compare"], capsys)
    assert f"--base: {base} has no adapter" in refused(["chat", str(base), *asked, "--base", str(base)], capsys)
    message = refused(["chat", str(ran), *asked, "--base", str(tmp_path / "no")], capsys)
    assert f"--base {tmp_path / 'no'}: no such file or folder" in message
    other = save_tiny_model(tmp_path / "other", intermediate_size=48)
    assert "belongs to another base" in refused(["chat", str(ran), *asked, "--base", str(other)], capsys)
    unnamed = tmp_path / "unnamed"
    shutil.copytree(ran, unnamed)
    config = json.loads((ran / "adapter_config.json").read_text())
    (unnamed / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "names no base; give the model" in refused(["chat", str(unnamed), *asked], capsys)
    for stdin in (io.StringIO(" \n"), None):  # Python has none if it was closed before the start
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "the prompt is empty" in refused(["chat", str(ran)], capsys)
