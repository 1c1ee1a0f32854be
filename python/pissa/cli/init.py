"""`pissa init`: splits a checkpoint on disk into residuals and a LoRA, in the memory of a few of its matrices."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pissa.cli.arguments import number, positive_int
from pissa.cli.terminal import UserError, as_size, say, silence_third_parties

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pissa.checkpoints.init import Initialised

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def _as_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if match is None:
        raise ValueError
    return int(float(match[1]) * _UNITS[match[2]])


_memory = number(_as_bytes, "a size above 0, e.g. 500MB or 2GB", lambda value: value > 0)
_alpha = number(float, "a number above 0", lambda value: 0 < value < float("inf"))


def _passes(text: str) -> int | str:
    return "auto" if text == "auto" else positive_int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder of the model, or its name on the Hugging Face Hub")
    parser.add_argument("target", type=Path, metavar="OUT", help="new folder, or that of a run that was interrupted")
    parser.add_argument(
        "--quant",
        metavar="FORMAT",
        help="keep the residual in nf4 or int8, in the format of transformers with bitsandbytes; dense unless given",
    )
    parser.add_argument("--rank", type=positive_int, default=16, metavar="R", help="rank of the adapter")
    parser.add_argument("--alpha", type=_alpha, metavar="A", help="LoRA alpha; the rank unless given")
    parser.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="layers to adapt; all linear ones but the output layer"
    )
    parser.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="layers not to adapt")
    parser.add_argument(
        "--init",
        choices=("pissa", "pissa_medium", "pissa_minor", "lora", "olora", "loftq"),
        default="pissa",
        help="where the adapter starts; lora is plain QLoRA",
    )
    parser.add_argument(
        "--quant-iters", type=positive_int, metavar="T", help="alternations of SVD and quantisation; 1 unless given"
    )
    parser.add_argument("--svd-passes", type=_passes, default="auto", metavar="N", help="reads of each matrix, even")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random sketch")
    parser.add_argument(
        "--memory", type=_memory, default="1GB", metavar="SIZE", help="matrices and results in memory at a time"
    )
    parser.add_argument(
        "--experts",
        metavar="FORMAT",
        default="dense",
        help="with --quant, fused experts: a dense residual, which every program reads, or in that format, which only "
        "pissa.load reads",
    )
    parser.add_argument("--device", default="cpu", metavar="DEV", help="where matrices are split, e.g. cuda")
    parser.add_argument("--json", action="store_true", help="report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Splits one checkpoint. Returns the exit code.

    Raises:
        UserError: for wrong arguments, folders and files.
    """
    if args.is_process and "peft" not in sys.modules:
        # PEFT imports an installed bitsandbytes, which takes a second and 40 MB; nothing here uses it.
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    silence_third_parties()
    from pissa import distributed
    from pissa.checkpoints.init import init
    from pissa.config import PissaConfig
    from pissa.files.hub import checkpoint_folder

    fields: dict[str, Any] = {
        "r": args.rank,
        "lora_alpha": args.alpha,
        "target_modules": args.target_modules,
        "exclude_modules": args.exclude_modules,
        "init": args.init,
        "svd_passes": args.svd_passes,
        "seed": args.seed,
        "quant": args.quant,
    }
    if args.quant_iters is not None:
        fields["quant_iters"] = args.quant_iters
    with _processes(), _notes(shown=not args.json) as notes:
        try:
            done = init(
                checkpoint_folder(args.source),
                args.target,
                PissaConfig(**fields),
                memory=args.memory,
                device=args.device,
                experts=args.experts,
                progressbar=True,
            )
        except (OSError, ValueError, TypeError, distributed.RankError) as error:
            raise UserError(str(error)) from error
        first = distributed.rank() == 0
    if first and args.json:
        print(json.dumps({**done._asdict(), "notes": notes}, indent=2))
    elif first:
        _report(args, done)
    return 0


@contextmanager
def _notes(shown: bool) -> Iterator[list[str]]:
    """The warnings of the block, said as they come: before hours of work that they may call in question."""
    from pissa import distributed

    texts: list[str] = []

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if (text := str(message)) not in texts:
            texts.append(text)
            if shown and distributed.rank() == 0:
                say("note", text)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = note
        yield texts


@contextmanager
def _processes() -> Iterator[None]:
    """Joins the processes that torchrun has started, for the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch.distributed as dist

    # The last process to end may be days behind; one that dies is torchrun's to notice.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


def _report(args: argparse.Namespace, done: Initialised) -> None:
    kept = f"{done.layers} layers, rank {args.rank}, residual {args.quant or 'dense'}"
    say("split", f"{args.source}: {kept}, start {args.init}")
    new = done.bytes_read - done.bytes_done_before
    before = f", {as_size(done.bytes_done_before)} by an earlier run" if done.bytes_done_before else ""
    say("read", f"{as_size(done.bytes_read)}{before}; {done.seconds:.1f} s, {as_size(round(new / done.seconds))}/s")
    if done.memory > args.memory:
        say(
            "memory",
            f"{as_size(done.memory)}, which {done.largest} needs by itself; --memory is {as_size(args.memory)}",
        )
    say("error", f"{done.error:.3%} of the weights' norm is in neither the residual nor the adapter")
    say("saved", f"{args.target}: {as_size(done.bytes_written)}, the adapter in pissa_init")
    if done.only_ours:
        say("next", f"pissa.load({str(args.target)!r}); no other program reads experts in {args.experts}")
    else:
        say("next", f"pissa.load({str(args.target)!r}); or, in any trainer, the model {args.target}")
        say("", f"with the LoRA adapter {args.target / 'pissa_init'}")
