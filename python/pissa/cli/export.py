"""`pissa export`: writes an adapter as what another runtime loads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pissa.cli.terminal import UserError, as_size, noted, say, silence_third_parties

if TYPE_CHECKING:
    from pissa.integrations.exported import Exported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="folder of the adapter: of pissa, PEFT, or a LoRA"
    )
    parser.add_argument("target", type=Path, metavar="OUT", help="new folder; of gguf a new file")
    parser.add_argument(
        "--to",
        required=True,
        choices=("bnb4", "vllm", "gguf", "merged"),
        help="bnb4: the 4-bit base of a QPiSSA adapter in bitsandbytes' format and a LoRA on it, exactly the trained "
        "model; vllm: a LoRA with experts one by one; gguf: a LoRA for llama.cpp; merged: one dense checkpoint",
    )
    parser.add_argument(
        "--base",
        metavar="DIR_OR_NAME",
        help="the model that the adapter was trained on, a folder or a name on the Hugging Face Hub; the one that the "
        "adapter names unless given",
    )
    parser.add_argument(
        "--initial",
        type=Path,
        metavar="DIR",
        help="of an adapter that PEFT trained on a residual: the adapter as it was saved before training",
    )
    parser.add_argument(
        "--requantise",
        action="store_true",
        help="bnb4 of an adapter whose base was not in 4 bits: merge and quantise it, with the error that is reported",
    )
    parser.add_argument("--json", action="store_true", help="report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Exports one adapter. Returns the exit code.

    Raises:
        UserError: for wrong arguments, folders and files.
    """
    silence_third_parties()
    from pissa.integrations.export import export

    with noted() as notes:
        try:
            done = export(
                args.adapter,
                args.target,
                args.to,
                base=args.base,
                initial=args.initial,
                requantise=args.requantise,
                progressbar=True,
            )
        except ModuleNotFoundError as error:
            if error.name != "gguf":
                raise
            raise UserError(str(error)) from error
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
    if args.json:
        print(json.dumps({**done._asdict(), "notes": notes}, indent=2))
    else:
        _report(args, done, notes)
    return 0


def _report(args: argparse.Namespace, done: Exported, notes: list[str]) -> None:
    say("adapter", f"{args.adapter}: {done.what}, {done.layers} layers")
    say("written", done.written)
    if done.worst is not None:
        layers = f"{done.mean_error:.3%} on average, {done.error_of_worst:.3%} at most, in {done.worst}"
        say("error", f"{done.error:.3%} of the weights' norm; of a layer {layers}")
    say("saved", f"{args.target}: {as_size(done.bytes_written)}")
    say("load", done.load)
    for note in notes:
        say("note", note)
