"""`pissa init`, `merge`, `export` and `convert`: commands for the package's functions that write a folder."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from pissa.cli.early_checks import check_records
from pissa.cli.terminal import (
    COLUMNS_HELP,
    UserError,
    as_size,
    collect_notes,
    columns,
    number,
    positive_int,
    print_row,
    silence_third_parties,
    user_errors,
)
from pissa.cli.training_options import INITS, init_method
from pissa.containers.recognise import has_output
from pissa.containers.staged import CompletedError, check_new, check_unused
from pissa.integrations import RUNTIMES


class FolderCommand(NamedTuple):
    """A command that calls a function and reports its result."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    work: Callable[[argparse.Namespace], Iterator[dict[str, Any]]]
    """Calls the function and yields its result for JSON; then prints it in lines."""
    check: Callable[[argparse.Namespace], None]
    """Refuses arguments that contradict each other, and files, as far as that needs no weights."""

    def run(self, args: argparse.Namespace) -> int:
        """Runs the command. Returns the exit code. An interrupted run keeps the work that it has done."""
        self.check(args)
        silence_third_parties()
        from pissa.distributed import RankError

        work = self.work(args)
        is_first = os.environ.get("RANK", "0") == "0"  # one of the processes that torchrun started
        with collect_notes(prints=is_first and not args.json) as notes, user_errors(OSError, ValueError, RankError):
            done = next(work)
        if is_first and args.json:
            print(json.dumps({**done, "notes": notes}, indent=2))
        elif is_first:
            next(work, None)
        return 0


_BASE = "model that the adapter was trained on: a folder, or a name on the Hugging Face Hub"
_NAMED_BASE = f"{_BASE} (default: the one that the adapter names)"


def _add_adapter(parser: argparse.ArgumentParser, target: str, base: str = _NAMED_BASE) -> None:
    """Adds the arguments that all commands which read an adapter share."""
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="the adapter's folder: a plain LoRA, or saved by pissa or PEFT")
    add("target", type=Path, metavar="OUT", help=target)
    add("--base", metavar="DIR_OR_NAME", help=base)
    add("--json", action="store_true", help="report as one JSON object")


def _add_calibration(parser: argparse.ArgumentParser, text: str) -> None:
    add = parser.add_argument
    add("--calibration", metavar="FILE", help=text)
    add("--columns", type=columns, metavar="NAME=COLUMN,...", help=COLUMNS_HELP)
    # About ten thousand tokens. bench/experiments, `repairs`, compares other numbers.
    add("--examples", type=positive_int, default=64, metavar="N", help="examples for the calibration")


def _check_target(target: Path) -> None:
    """Refuses a folder in which anything but such a command has written."""
    if not has_output(target):
        with user_errors(ValueError):
            check_unused(target)


def _check_calibration(args: argparse.Namespace) -> None:
    if args.calibration is not None:
        check_records(args.calibration, args.columns)


def _calibration(args: argparse.Namespace, model: str | Path) -> list[Any] | None:
    """What the options of `_add_calibration` name, for the tokenizer of a model; None without them."""
    from pissa.cli.data import batches_of

    return None if args.calibration is None else batches_of(args.calibration, args.examples, model, args.columns)


def _options(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The named options, which are also arguments of a function."""
    return {name: getattr(args, name) for name in names}


# ---- pissa init ------------------------------------------------------------------------------------------------------

_METHOD = ("target_modules", "exclude_modules", "init", "seed", "quant", "quant_iters")


def _as_bytes(text: str) -> int:
    from accelerate.utils import convert_file_size_to_int  # imports torch

    return int(convert_file_size_to_int(text.upper()))  # a small b means bits there


_memory = number(_as_bytes, "a size above 0, e.g. 500MB or 2GB", lambda value: value > 0)
_alpha = number(float, "a number above 0", lambda value: 0 < value < float("inf"))


def _add_init(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="folder of the model, or its name on the Hugging Face Hub")
    add("target", type=Path, metavar="OUT", help="new folder, or the folder of an interrupted run")
    quant = "keep the residual in this format, as transformers does with bitsandbytes (default: dense)"
    add("--quant", choices=("nf4", "int8"), help=quant)
    add("--rank", type=positive_int, default=16, metavar="R", help="rank of the adapter")
    add("--alpha", type=_alpha, metavar="A", help="LoRA alpha (default: the rank)")
    modules = "layers to adapt (default: all linear ones except the output layer)"
    add("--target-modules", nargs="+", metavar="NAME", help=modules)
    add("--exclude-modules", nargs="+", metavar="NAME", help="layers not to adapt")
    init = f"start of the adapter: {', '.join(INITS)} (with --calibration); lora is plain QLoRA's"
    add("--init", type=init_method, default="pissa", metavar="METHOD", help=init)
    calibration = (
        "with --quant: records like those that the model will read. Error feedback then chooses codes "
        "that keep the outputs closer; with --init lora, the checkpoint is better for any QLoRA program"
    )
    _add_calibration(parser, calibration)
    add("--quant-iters", type=positive_int, default=1, metavar="T", help="alternations of SVD and quantisation")
    add("--seed", type=int, default=0, metavar="N", help="seed of the random sketch")
    memory = "memory limit for matrices and results; a larger matrix may exceed it (default: 1GB)"
    add("--memory", type=_memory, default=10**9, metavar="SIZE", help=memory)
    experts = "format of fused experts with --quant: dense, or the same one, which only pissa.load reads"
    add("--experts", metavar="FORMAT", default="dense", help=experts)
    add("--device", default="cpu", metavar="DEV", help="where matrices are split, e.g. cuda")
    add("--json", action="store_true", help="report as one JSON object")


@contextmanager
def _processes() -> Iterator[None]:
    """Joins the processes that torchrun has started, for the duration of the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch.distributed as dist

    # The last process may end days after the first. If one dies, torchrun notices.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


def _check_init(args: argparse.Namespace) -> None:
    _check_target(args.target)
    if args.calibration is not None and args.quant is None:
        raise UserError(
            "--calibration: needs --quant, whose codes it chooses; give --quant nf4 or int8, or leave it out"
        )
    if args.init == "activations" and args.calibration is None:
        raise UserError("--init activations: got no --calibration; give --calibration FILE, or another --init")
    _check_calibration(args)


def _init(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if args.is_process and "peft" not in sys.modules:
        # PEFT imports bitsandbytes if it is installed. That takes a second and 40 MB, and nothing here uses it.
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    from pissa.checkpoints.init import init
    from pissa.config import PissaConfig
    from pissa.containers.checkpoint import INITIAL_FOLDER

    with user_errors(TypeError), _processes():  # raised for a layer of a kind that cannot be adapted
        method = _options(args, *_METHOD)
        batches = _calibration(args, args.source)
        done = init(
            args.source,
            args.target,
            PissaConfig(r=args.rank, lora_alpha=args.alpha, error_feedback=batches is not None, **method),
            **_options(args, "memory", "device", "experts"),
            calibration=batches,
            progressbar=True,
        )
    yield vars(done)
    kept = f"{done.layers} layers, rank {args.rank}, residual {args.quant or 'dense'}"
    print_row("split", f"{args.source}: {kept}, start {args.init}")
    given_up = ", lost to keep the outputs closer" if args.calibration else ""
    print_row("error", f"{done.error:.3%} of the weights' norm is in neither the residual nor the adapter{given_up}")
    print_row("saved", f"{args.target}: {as_size(done.bytes_written)}, the adapter in pissa_init")
    if done.only_ours:
        print_row("next", f"pissa.load({str(args.target)!r}); no other program reads experts in {args.experts}")
    else:
        print_row("next", f"pissa.load({str(args.target)!r}); or, in any trainer, the model {args.target}")
        print_row("", f"with the LoRA adapter {args.target / INITIAL_FOLDER}")


INIT = FolderCommand(_add_init, _init, _check_init)

# ---- pissa merge -----------------------------------------------------------------------------------------------------


_READ = "records like those that the model will read, for error feedback"


def _add_merge(parser: argparse.ArgumentParser) -> None:
    base = "model of the adapter (default: the one that it names); or a folder that pissa init has written"
    _add_adapter(parser, "new folder, or the folder of an interrupted run", base)
    quant = "form of the linear layers: nf4 or int8, as in bitsandbytes; same: the base's own codes (default: dense)"
    parser.add_argument("--quant", metavar="FORMAT", choices=("nf4", "int8", "same"), help=quant)
    data = "records with questions and answers: compare the loss of base, adapter and merged model on them"
    parser.add_argument("--data", metavar="DATA", help=data)
    _add_calibration(parser, f"with --quant same: {_READ}")


def _check_merge(args: argparse.Namespace) -> None:
    _check_target(args.target)
    if args.data and args.quant == "int8" and find_spec("bitsandbytes") is None:
        raise UserError(
            "--data: only bitsandbytes computes in int8; run `pip install bitsandbytes`, or leave --data out"
        )
    if args.data:
        check_records(args.data, None)
    _check_calibration(args)


def _merge(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from pissa.adapters.lora_folder import open_adapter
    from pissa.checkpoints.merge import prepare
    from pissa.cli.held_out import loss_merged, losses_before, read_rows
    from pissa.cli.trained import base_of

    args.base = base_of(open_adapter(args.adapter), args.adapter, args.base)
    batches = _calibration(args, args.base)
    run = prepare(args.adapter, args.base, args.target, quant=args.quant, calibration=batches)
    rows, found = [], dict[str, float]()
    if args.data:  # what cannot be compared is not merged
        run.check_target()  # before the minutes that the base and the adapter take
        rows = read_rows(args.base, args.data)
        with user_errors(KeyError, TypeError, RuntimeError):
            found = losses_before(args.base, args.adapter, rows)
    done: Any = None
    try:
        done = run.merged(progressbar=True)
    except CompletedError as error:
        if not rows:
            raise
        complete = str(error)
    if rows:
        found["merged"] = loss_merged(args.target, rows)
    yield ({} if done is None else vars(done) | _kept_as_dicts(done)) | {"loss": found}
    if done is None:
        print_row("note", complete)
    else:
        _print_merged(args, done)
    if found:
        print_row("loss", ", ".join(f"{what} {loss:.4f}" for what, loss in found.items()))


def _print_merged(args: argparse.Namespace, done: Any) -> None:
    print_row("adapter", f"{args.adapter}: {done.what}, {done.layers} layers")
    if done.kept is not None:
        print_row("merged", f"{done.quantised} layers into the codes of the base")
        _print_kept(done.kept, done.kept_of_layers)
    else:
        form = f"{done.quantised} layers in {args.quant}" if args.quant else "dense, rounded once"
        print_row("error", f"{form}: {done.error:.3%} of the weights' norm, {done.error_of_change:.3%} of the change's")
    print_row("saved", f"{args.target}: {as_size(done.bytes_written)}")


def _kept_as_dicts(done: Any) -> dict[str, Any]:
    of_layers = {name: kept._asdict() for name, kept in done.kept_of_layers.items()}
    return {"kept": None if done.kept is None else done.kept._asdict(), "kept_of_layers": of_layers}


_GOOD = 0.94
"""The share from which a merge is called good: the least that was measured. With 94.4% to 99.9% of the change, 97% to
100% of the gain in loss was kept (bench/results/merge_share.json, rounded at random)."""


def _print_kept(kept: Any, of_layers: Mapping[str, Any]) -> None:
    """What became of a change in the codes of a base."""
    worst = min(of_layers, key=lambda name: of_layers[name].share)
    print_row("merge", f"{'good' if kept.share >= _GOOD else 'poor'}: {kept.share:.1%} of the change is kept")
    if kept.share < _GOOD:
        print_row("", "train with --merge-aware, or merge without --quant, into dense weights")
    print_row("", f"least in {worst}, {of_layers[worst].share:.1%}; {kept.moved:.2%} of the codes are new")
    print_row("", f"rounding adds noise of {kept.noise:.1f} times the change, which averages out over a layer's inputs")
    if kept.beyond:
        print_row("", f"{kept.beyond:.2%} of the changes led beyond the levels of their block")


MERGE = FolderCommand(_add_merge, _merge, _check_merge)

# ---- pissa export ----------------------------------------------------------------------------------------------------


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_adapter(parser, "new folder, or for gguf and gguf-model a new file")
    runtimes = "; ".join(f"{name}: {what}" for name, what in RUNTIMES.items())
    parser.add_argument("--to", required=True, choices=RUNTIMES, help=runtimes)
    check = "for gguf and gguf-model: compare what llama.cpp generates with the model; needs llama-cpp-python"
    parser.add_argument("--check", action="store_true", help=check)
    parser.add_argument("--type", choices=["q8_0"], help="for gguf-model of a 16-bit model: write 8 bits per weight")
    _add_calibration(parser, f"for gguf-model: {_READ}")


def _check_export(args: argparse.Namespace) -> None:
    if args.check and not args.to.startswith("gguf"):
        raise UserError(f"--check: got --to {args.to}; it compares with llama.cpp, which --to gguf is for")
    with user_errors(ValueError):
        checks: dict[str, Callable[[Path], None]] = {"bnb4": _check_target, "vllm": check_unused}
        checks.get(args.to, check_new)(args.target)
    _check_calibration(args)


def _export(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from pissa.adapters.lora_folder import open_adapter
    from pissa.integrations.export import export

    batches = _calibration(args, args.base or open_adapter(args.adapter).named_base or args.adapter)
    options = {"base": args.base, "calibration": batches, "type": args.type}
    done = export(args.adapter, args.target, args.to, **options, progressbar=True)
    yield done._asdict() | _kept_as_dicts(done)
    print_row("adapter", f"{args.adapter}: {done.what}, {done.layers} layers")
    print_row("written", done.written)
    if done.kept is not None:
        _print_kept(done.kept, done.kept_of_layers)
    if done.error:
        print_row("error", f"{done.error:.3%} of the weights' norm")
    print_row("saved", f"{args.target}: {as_size(done.bytes_written)}")
    print_row("load", done.load)
    if args.check:
        from pissa.integrations.llama_cpp import TOKENS, compare

        compared = (None, args.target, None) if args.to == "gguf-model" else (args.adapter, args.base, args.target)
        for prompt, equal, gap in compare(*compared):
            ended = "" if gap is None else f", then two tokens {gap:.2g} apart in their logits"
            print_row("check", f"{prompt!r}: llama.cpp continues with the same {equal} of {TOKENS} tokens{ended}")


EXPORT = FolderCommand(_add_export, _export, _check_export)

# ---- pissa convert ---------------------------------------------------------------------------------------------------


def _add_convert(parser: argparse.ArgumentParser) -> None:
    _add_adapter(parser, "new folder for the LoRA")
    initial = "the adapter as it was saved before training, or a residual model that contains it in pissa_init"
    initial = f"if PEFT trained the adapter on a residual: {initial}"
    parser.add_argument("--initial", type=Path, metavar="DIR", help=initial)
    rank = "rank to which layers are reduced, by the best approximation"
    parser.add_argument("--rank", type=positive_int, metavar="N", help=rank)


def _check_convert(args: argparse.Namespace) -> None:
    with user_errors(ValueError):
        check_unused(args.target)


def _convert(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from pissa.conversion.convert import convert

    done = convert(args.adapter, args.target, **_options(args, "base", "initial", "rank"), progressbar=True)
    yield vars(done)
    print_row("source", f"{args.adapter}: {done.layout}")
    before, after = map(as_range, zip(*done.ranks.values(), strict=True))
    print_row("rank", f"{before} in {len(done.ranks)} layers, now {after}")
    if args.rank is not None:
        print_row("energy", f"{done.kept:.4%} of the change of all layers")
    print_row("saved", f"{args.target}: a plain LoRA for the unmodified base")


def as_range(numbers: Sequence[int]) -> str:
    """The smallest and the largest of the numbers, as text."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


CONVERT = FolderCommand(_add_convert, _convert, _check_convert)
