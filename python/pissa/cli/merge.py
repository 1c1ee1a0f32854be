"""`pissa merge`: merges an adapter into a checkpoint on disk, in the memory of a few of its matrices."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pissa.cli.terminal import UserError, as_size, noted, say, silence_third_parties

if TYPE_CHECKING:
    from pissa.checkpoints.merge import Merged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="folder of the adapter: of pissa, PEFT, or a LoRA"
    )
    parser.add_argument("target", type=Path, metavar="OUT", help="new folder, or that of a run that was interrupted")
    parser.add_argument(
        "--base",
        required=True,
        metavar="SRC",
        help="folder of the model that the adapter was trained on, or its name on the Hugging Face Hub; also what "
        "pissa init has written",
    )
    parser.add_argument(
        "--initial",
        type=Path,
        metavar="DIR",
        help="of an adapter that PEFT trained on a residual: the adapter as it was saved before training, or a "
        "residual model that has it in pissa_init",
    )
    parser.add_argument(
        "--quant",
        metavar="FORMAT",
        help="write the linear layers in nf4 or int8, in the format of transformers with bitsandbytes; dense unless "
        "given",
    )
    parser.add_argument("--json", action="store_true", help="report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Merges one adapter. Returns the exit code.

    Raises:
        UserError: for wrong arguments, folders and files. What an interrupted run has done stays.
    """
    silence_third_parties()
    from pissa.checkpoints.merge import merge
    from pissa.files.hub import checkpoint_folder

    with noted() as notes:
        try:
            done = merge(
                args.adapter,
                checkpoint_folder(args.base),
                args.target,
                quant=args.quant,
                initial=args.initial,
                progressbar=True,
            )
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
    if args.json:
        print(json.dumps({**done._asdict(), "notes": notes}, indent=2))
    else:
        _report(args, done, notes)
    return 0


def _report(args: argparse.Namespace, done: Merged, notes: list[str]) -> None:
    say("adapter", f"{args.adapter}: {done.what}, {done.layers} layers")
    before = f", {as_size(done.bytes_done_before)} by an earlier run" if done.bytes_done_before else ""
    rate = round((done.bytes_read - done.bytes_done_before) / done.seconds)
    say("read", f"{as_size(done.bytes_read)}{before}; {done.seconds:.1f} s, {as_size(rate)}/s")
    written = f"{done.quantised} layers in {args.quant}" if args.quant else "dense, rounded once"
    say("error", f"{written}: {done.error:.3%} of the weights' norm, {done.error_of_change:.3%} of the change's")
    say("saved", f"{args.target}: {as_size(done.bytes_written)}")
    for note in notes:
        say("note", note)
