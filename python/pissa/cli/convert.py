"""`pissa convert`: writes an adapter of any PiSSA layout as a plain LoRA, and reports what a lower rank left out."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pissa.cli.arguments import number, positive_int
from pissa.cli.terminal import UserError, format_table, noted, say, silence_third_parties

if TYPE_CHECKING:
    from pissa.conversion import Conversion, ConvertedLayer


_share = number(float, "a number above 0 and at most 1", lambda value: 0 < value <= 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of the adapter: of pissa, PEFT, or a LoRA")
    parser.add_argument("target", type=Path, metavar="DST", help="new folder for the LoRA")
    parser.add_argument(
        "--base",
        metavar="DIR_OR_NAME",
        help='the unmodified model: the start of PEFT\'s exact "pissa" is computed from it, a residual model compared',
    )
    parser.add_argument(
        "--initial",
        type=Path,
        metavar="DIR",
        help="the adapter as it was saved before training, or a residual model that has it in pissa_init",
    )
    lower = parser.add_mutually_exclusive_group()
    lower.add_argument("--rank", type=positive_int, metavar="N", help="largest rank of a layer; what is best is kept")
    lower.add_argument(
        "--energy", type=_share, metavar="X", help="share of the change's square that each layer keeps, e.g. 0.99"
    )
    parser.add_argument(
        "--subtracted",
        action="store_true",
        default=None,
        help="the source is [B, -B0] [A ; A0], as PEFT's path_initial_model_for_weight_conversion writes it; usually "
        "recognised without",
    )
    parser.add_argument("--json", action="store_true", help="report every layer as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Converts one adapter. Returns the exit code.

    Raises:
        UserError: for wrong arguments, folders and files; nothing is written.
    """
    silence_third_parties()
    import pissa

    with noted() as notes:
        try:
            conversion = pissa.convert(
                args.source,
                args.target,
                base=args.base,
                initial=args.initial,
                rank=args.rank,
                energy=args.energy,
                subtracted=args.subtracted,
                progressbar=True,
            )
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
    if args.json:
        print(json.dumps(_as_json(conversion, notes), indent=2))
    else:
        _report(args, conversion, notes)
    return 0


def _as_json(conversion: Conversion, notes: list[str]) -> dict[str, Any]:
    layers = {name: {**layer._asdict(), "kept": layer.kept} for name, layer in conversion.layers.items()}
    return {
        "layout": conversion.layout,
        "kept": conversion.kept,
        "layers": layers,
        "notes": notes,
    }


def _report(args: argparse.Namespace, conversion: Conversion, notes: list[str]) -> None:
    say("source", f"{args.source}: {conversion.layout}")
    kinds: dict[str, list[ConvertedLayer]] = defaultdict(list)
    for name, layer in conversion.layers.items():
        kinds[name.removesuffix(".weight").rpartition(".")[2]].append(layer)
    lowered = args.rank is not None or args.energy is not None
    header = ("layers", "number", "rank", "new rank", "energy kept\nleast", "\nof all")
    columns = len(header) if lowered else 4
    print(format_table(header[:columns], [row[:columns] for row in _rows(kinds)]))
    if lowered:
        name, least = min(conversion.layers.items(), key=lambda item: item[1].kept)
        say("energy", f"{conversion.kept:.4%} of the change of all layers; least, {least.kept:.4%}, in {name}")
    say("saved", f"{args.target}: a plain LoRA for the unmodified base")
    for note in notes:
        say("note", note)


def _rows(kinds: dict[str, list[ConvertedLayer]]) -> list[tuple[str, ...]]:
    from pissa.conversion import total_kept

    return [
        (
            kind,
            str(len(layers)),
            _range([layer.rank_before for layer in layers]),
            _range([layer.rank for layer in layers]),
            f"{min(layer.kept for layer in layers):.4%}",
            f"{total_kept(layers):.4%}",
        )
        for kind, layers in kinds.items()
    ]


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
