"""`pissa chat`: a conversation with a trained model. transformers generates the answers and streams them."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from pissa.cli.templates import end_of_answer, prompt_text
from pissa.cli.terminal import (
    THREADS_HELP,
    UserError,
    collect_notes,
    first_interrupt,
    has_terminal,
    number,
    positive_int,
    print_row,
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
    add("--prompt", metavar="TEXT", help="answer this prompt and exit; text from a pipe is treated likewise")
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
    prompt = "" if is_conversation else _text(lambda: _piped() if args.prompt is None else args.prompt).strip()
    if not is_conversation and not prompt:
        raise UserError("the prompt is empty; give --prompt TEXT or a text through a pipe, or start it in a terminal")
    from pissa.cli.cores import Threads

    threads = Threads(args.threads)
    with contextlib.redirect_stdout(sys.stderr), collect_notes(prints=True):
        chat = Conversation(args, *_load(args))
        threads.choose()
    if is_conversation:
        return _converse(chat)
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


# ---- The model -------------------------------------------------------------------------------------------------------


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model that RUN is, or its adapter on its base, and the tokenizer."""
    from pissa.adapters.lora_folder import has_adapter, open_adapter
    from pissa.adapters.pissa_layout import ADAPTER_FILES
    from pissa.cli.trained import check_has_base, load_trained
    from pissa.containers.checkpoint import Contents, ModelFolder
    from pissa.containers.hub import adapter_folder

    with user_errors(OSError, ValueError):
        folder = adapter_folder(args.source, ADAPTER_FILES)
        lora = open_adapter(folder) if has_adapter(folder) else None
    if lora is None and (args.compare or args.base):
        option = "--compare" if args.compare else "--base"
        raise UserError(f"{option}: {args.source} has no adapter; give a run or an adapter, or leave {option} out")
    base = args.source if lora is None else args.base or lora.named_base
    if base is None:
        raise UserError(f"{args.source} names no base; give the model it was trained on: --base DIR_OR_NAME [P112]")
    hint = "; give the model that the adapter was trained on: --base DIR_OR_NAME [P112]"
    if lora is None:
        hint = "; there is no adapter either: a run that has not ended has it in its last checkpoint-N [P113]"
    with user_errors(OSError, ValueError, after=hint):
        opened = ModelFolder.open(base, config_from=args.config_from)
    if args.compare and lora is not None:
        check_has_base("--compare", lora, opened)
    with user_errors(OSError, ValueError, KeyError, TypeError, RuntimeError, before=f"{args.source}: "):
        if lora is None:
            opened.require(*(contents for contents in Contents if contents is not Contents.PEFT_RESIDUAL))
        trusted = {"trust_remote_code": args.trust_remote_code}
        model = load_trained(base, opened, lora, args.config_from, **trusted)
        tokenizer = opened.tokenizer(None if lora is None else args.source, **trusted)
    print_row("model", f"{base}, {model.dtype}".replace("torch.", "") + (f", with {args.source}" if lora else ""))
    return model, tokenizer


# ---- The conversation ------------------------------------------------------------------------------------------------


class Conversation:
    """A model, its tokenizer, and the messages so far. With --compare, the base has a conversation of its own."""

    def __init__(self, args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
        from pissa.cli.generation import context_of

        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.context = context_of(model)
        ends = model.generation_config.eos_token_id
        self.ends = {*([ends] if isinstance(ends, int) else ends or ())}
        self.stopped = False
        self.begin()
        if tokenizer.chat_template is not None:
            self.ends.update(end_of_answer(tokenizer))
        elif args.system is not None:
            raise UserError("--system: the tokenizer has no chat template, which would place it; leave it out [P115]")
        else:
            print_row("note", "the tokenizer has no chat template: each text is continued, without the others [P115]")

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
        self.stopped, answered = False, {}
        for is_adapted, before in self.messages.items():
            messages = [*before, {"role": "user", "content": prompt}]
            tokens = self._encode(messages)
            if self.args.compare:
                print(f"--- {self.args.source if is_adapted else 'base'}", flush=True)
            with contextlib.nullcontext() if is_adapted else self.model.disable_adapter():
                answer = self._answer(tokens)
            answered[is_adapted] = [*messages, {"role": "assistant", "content": answer}]
            if self.stopped:
                break
        if len(answered) == len(self.messages):
            self.messages = answered

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        from pissa.cli.generation import check_tokens

        if self.tokenizer.chat_template is None:
            tokens = self.tokenizer(messages[-1]["content"]).input_ids
        else:
            tokens = self.tokenizer(prompt_text(messages, self.tokenizer), add_special_tokens=False).input_ids
        if len(tokens) >= self.context:
            raise UserError(
                f"the conversation has {len(tokens):,} tokens, and the model reads at most {self.context:,}, with the "
                "answer; begin a new one with /new, or ask for less"
            )
        check_tokens(self.model, self.tokenizer, tokens)
        return list(tokens)

    def _answer(self, tokens: list[int]) -> str:
        import torch
        from transformers import TextStreamer

        from pissa.cli.generation import generate

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
