"""`pissa report`: reports a checkpoint's spectra and training memory."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from pissa.cli.folders import FolderCommand
from pissa.cli.terminal import as_size, format_table, positive_int, print_row


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add, count = parser.add_argument, dict[str, Any](type=positive_int, metavar="N")
    add("model", metavar="MODEL", help="folder of the model, or its name on the Hugging Face Hub")
    add("--quant", metavar="FORMAT", help="format of the base, e.g. nf4 (for the memory; default: as it is)")
    add("--rank", nargs="+", default=(16, 64, 128), help="ranks of adapters", **count)
    add("--batch", default=1, help="sequences in a step (for the memory)", **count)
    add("--length", default=512, help="tokens in a sequence (for the memory)", **count)
    add("--json", action="store_true", help="print one JSON object instead of tables")


def _report(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from pissa.checkpoints.spectra import report

    found = report(args.model, args.rank, quant=args.quant, batch=args.batch, length=args.length)
    yield found
    kinds, ranks, memory = found["kinds"], found["ranks"], found["memory"]
    print_row("model", f"{args.model}: {kinds['all']['layers']} layers of {found['parameters']:,} parameters to adapt")
    how = "as PiSSA's own decomposition finds them: never above the true ones"
    print_row("spectrum", f"up to {ranks[-1]} singular values of each layer, {how}")
    rows = [
        [kind, str(summary["layers"]), *(f"{share:.1%}" for share in summary["energy"].values())]
        for kind, summary in kinds.items()
    ]
    print(f"\n{format_table(('energy held by rank', 'layers', *map(str, ranks)), rows)}\n")
    step = f"a step at rank {memory['rank']}, {memory['batch']} x {memory['length']} tokens"
    for part, label in (("plain", step), ("checkpointing", "with gradient checkpointing")):
        sizes = {name: as_size(size) for name, size in memory[part].items()}
        adapter = as_size(sum(memory[part][name] for name in ("start", "trained", "gradients", "optimizer")))
        parts = f"weights {sizes['weights']}, adapter and AdamW {adapter}, activations {sizes['activations']}"
        print_row("memory", f"{label}: about {sizes['total']} ({parts})")


REPORT = FolderCommand(_add_arguments, _report)
