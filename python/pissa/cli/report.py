"""`pissa report`: what a checkpoint holds for PiSSA: spectra, errors of quantised bases, ranks for a budget, memory."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pissa.cli.arguments import positive_int
from pissa.cli.terminal import UserError, say, silence_third_parties, told
from pissa.files.staged import Staged, check_unused

if TYPE_CHECKING:
    from pissa.checkpoints.report import Report

NUMBERS = "report.json"
RANKS = (16, 64, 128)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of the model, or its name on the Hugging Face Hub")
    parser.add_argument("--quant", choices=("nf4", "int8"), help="report the errors of bases in this format too")
    ranks = " ".join(map(str, RANKS))
    parser.add_argument(
        "--rank", type=positive_int, nargs="+", metavar="N", help=f"ranks of adapters (default: {ranks})"
    )
    parser.add_argument(
        "--budget",
        type=positive_int,
        metavar="PARAMETERS",
        help="trained parameters that the suggested ranks may have; by default what the smallest rank has",
    )
    parser.add_argument(
        "--sample", type=positive_int, metavar="N", help="quantise N layers of each kind, evenly spaced, instead of all"
    )
    parser.add_argument("--exact", action="store_true", help="all singular values: slow for large matrices")
    parser.add_argument(
        "--batch", type=positive_int, default=1, metavar="N", help="sequences of a step, for the memory"
    )
    parser.add_argument("--length", type=positive_int, default=512, metavar="N", help="tokens of a sequence")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for the numbers and pictures")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Reports on one checkpoint. Returns the exit code.

    Raises:
        UserError: for a folder that holds no such model, or numbers that do not fit it.
    """
    silence_third_parties()
    if args.out is not None:
        with told(ValueError, before="--out "):
            check_unused(args.out)
    from pissa.checkpoints.report import report
    from pissa.cli.report_table import print_tables
    from pissa.files.hub import checkpoint_folder

    try:
        found = report(
            checkpoint_folder(args.model),
            args.rank or RANKS,
            quant=args.quant,
            budget=args.budget,
            sampled=args.sample,
            exact=args.exact,
            batch=args.batch,
            length=args.length,
            progressbar=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    found = replace(found, model=args.model)  # not the folder into which it was fetched
    if args.out is not None:
        _write(found, args.out)
    if args.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print_tables(found)
        if args.out is not None:
            say("written", f"{args.out / NUMBERS} and pictures")
    return 0


def _write(found: Report, folder: Path) -> None:
    from pissa.cli.report_pictures import pictures, png

    with Staged(folder) as staged:
        for name, figure in pictures(found).items():
            staged.path(f"{name}.png").write_bytes(png(figure))
        staged.path(NUMBERS).write_text(json.dumps(found.as_dict(), indent=2) + "\n")
