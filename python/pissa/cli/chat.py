"""`pissa chat`: a conversation with a trained model. transformers generates the answers and streams them."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from pissa.cli.templates import check_template
from pissa.cli.terminal import (
    THREADS_HELP,
    UserError,
    collect_notes,
    first_interrupt,
    has_terminal,
    number,
    positive_int,
    silence_third_parties,
    user_errors,
)

_COMMANDS = "Ctrl-C stops an answer, /new begins a new conversation, /quit or Ctrl-D ends."
_temperature = number(float, "a number from 0 on", lambda value: 0 <= value < float("inf"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    source = "folder of a run, an adapter or a model, a GGUF file, or its name on the Hugging Face Hub"
    add("source", metavar="RUN", help=source)
    add("--base", metavar="DIR_OR_NAME", help="model of the adapter (default: the one that the adapter names)")
    add("--config-from", metavar="DIR_OR_NAME", help="model whose config.json and tokenizer are used for a GGUF file")
    add("--compare", action="store_true", help="also show the base's answer, with the adapter disabled")
    prompt = "answer this prompt and exit; several are answered each by itself; text from a pipe is one prompt"
    add("--prompt", action="append", metavar="TEXT", help=prompt)
    add("--system", metavar="TEXT", help="system prompt")
    add("--max-tokens", type=positive_int, default=512, metavar="N", help="longest answer, in tokens")
    sampling = "0: always the likeliest token; above 0: sampled (default: as in the model's generation_config.json)"
    add("--temperature", type=_temperature, metavar="T", help=sampling)
    add("--threads", type=positive_int, metavar="N", help=THREADS_HELP)
    code = "run the code that comes with the model or its tokenizer, also where the training was given this option"
    add("--trust-remote-code", action="store_true", help=code)


def run(args: argparse.Namespace) -> int:
    """Answers one prompt, or holds a conversation. Only answers go to stdout. Returns the exit code."""
    silence_third_parties()
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)  # options that others make superfluous
    is_conversation = args.prompt is None and has_terminal()
    _text(lambda: args.system or "")
    given = [] if is_conversation else [_piped] if args.prompt is None else [partial(str, text) for text in args.prompt]
    prompts = [_text(read).strip() for read in given]
    if not all(prompts):
        raise UserError("the prompt is empty; give --prompt TEXT or a text through a pipe, or start it in a terminal")
    from pissa.cli.cores import Threads

    threads = Threads(args.threads)
    with contextlib.redirect_stdout(sys.stderr), collect_notes(prints=True):
        from pissa.cli.trained import open_trained

        chat = Conversation(args, *open_trained(args, is_compared=args.compare))
        threads.choose()
    if is_conversation:
        return _converse(chat)
    for prompt in prompts:
        chat.begin()
        chat.ask(prompt)
    return 0


def _piped() -> str:
    return "" if sys.stdin is None else sys.stdin.read()


def _text(read: Callable[[], str]) -> str:
    """What someone has typed, given as an argument, or sent through a pipe."""
    needed = "; needed: UTF-8, and a locale of UTF-8, such as LC_ALL=C.UTF-8"
    with user_errors(UnicodeError, before="the text cannot be read: ", after=needed):
        text = read()
        text.encode()  # Python keeps bytes that it cannot read in halves of surrogate pairs
        return text


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- The conversation ------------------------------------------------------------------------------------------------


class Conversation:
    """A model, its tokenizer, and the messages so far. With --compare, the base has a conversation of its own."""

    def __init__(self, args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
        from pissa.cli.generation import ends_of

        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.ends = ends_of(model, tokenizer)
        self.stopped = False
        self.begin()
        check_template(tokenizer, args.system)

    def begin(self) -> None:
        """Forgets all messages but the system prompt."""
        system = [] if self.args.system is None else [{"role": "system", "content": self.args.system}]
        self.messages = dict.fromkeys([False, True] if self.args.compare else [True], system)
        """The messages of each side, by whether the adapter is enabled."""

    def ask(self, prompt: str) -> None:
        """Prints the answer to the next message, and with --compare before it that of the base.

        Raises:
            UserError: the model's context has no room for an answer.
        """
        from pissa.cli.generation import prompt_tokens

        self.stopped, answered = False, {}
        for is_adapted, before in self.messages.items():
            messages = [*before, {"role": "user", "content": prompt}]
            tokens = prompt_tokens(self.model, self.tokenizer, messages, "begin a new one with /new, or ask for less")
            if self.args.compare:
                print(f"--- {self.args.source if is_adapted else 'base'}", flush=True)
            with contextlib.nullcontext() if is_adapted else self.model.disable_adapter():
                answer = self._answer(tokens)
            answered[is_adapted] = [*messages, {"role": "assistant", "content": answer}]
            if self.stopped:
                break
        if len(answered) == len(self.messages):
            self.messages = answered

    def _answer(self, tokens: list[int]) -> str:
        import torch
        from transformers import TextStreamer

        from pissa.cli.generation import generate, repeats_itself

        most, temperature = self.args.max_tokens, self.args.temperature
        options: dict[str, Any] = {
            "streamer": TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            "stopping_criteria": [lambda ids, _, **__: torch.full((len(ids),), self.stopped, device=ids.device)],
        }
        if temperature is not None:
            options |= {"do_sample": temperature > 0, "temperature": temperature or None}
        began = time.perf_counter()
        found = generate(self.model, self.tokenizer, tokens, most, self.ends, **options)
        speed = f"{len(found)} tokens, {len(found) / (time.perf_counter() - began):.1f} a second"
        if self.stopped:
            speed += "; stopped"
        elif repeats_itself(found, self.tokenizer):
            speed += "; stopped: it repeats itself"
        elif found[-1] not in self.ends:
            limit = "--max-tokens" if len(found) == most else "the model's context is full; /new begins anew"
            speed += f"; cut: {limit}"
        _say(f"({speed})")
        answer: str = self.tokenizer.decode(found, skip_special_tokens=True)
        return answer

    def stop(self) -> None:
        """Ends the answer after its next token."""
        self.stopped = True


def _converse(chat: Conversation) -> int:
    with contextlib.suppress(ImportError):  # a Python without it only lacks editing and history of lines
        import readline  # noqa: F401
    _say(_COMMANDS)
    while True:
        try:
            with contextlib.redirect_stdout(sys.stdout if sys.stdout.isatty() else sys.stderr):
                prompt = _text(lambda: input("> ")).strip()
        except EOFError:
            _say("")
            return 0
        except UserError as error:
            _say(str(error))
            continue
        if prompt == "/quit":
            return 0
        if prompt == "/new":
            chat.begin()
            _say("a new conversation")
        elif prompt.startswith("/"):
            _say(_COMMANDS)
        elif prompt:
            try:
                with first_interrupt(chat.stop):
                    chat.ask(prompt)
            except UserError as error:
                _say(str(error))
