"""`pissa report`: reports a checkpoint's spectra, ranks for a budget, and training memory."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

from pissa.cli.folders import FolderCommand, as_range
from pissa.cli.terminal import as_size, format_table, positive_int, print_row


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add, count = parser.add_argument, dict[str, Any](type=positive_int, metavar="N")
    add("model", metavar="MODEL", help="folder of the model, or its name on the Hugging Face Hub")
    add("--quant", metavar="FORMAT", help="format of the base, e.g. nf4 (for the memory; default: as it is)")
    add("--rank", nargs="+", default=(16, 64, 128), help="ranks of adapters", **count)
    budget = "number of trained parameters for the suggested ranks (default: as many as the smallest rank has)"
    add("--budget", help=budget, **count)
    add("--batch", default=1, help="sequences in a step (for the memory)", **count)
    add("--length", default=512, help="tokens in a sequence (for the memory)", **count)
    add("--json", action="store_true", help="print one JSON object instead of tables")


def _report(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from pissa.checkpoints.spectra import Summary, report

    options = {"quant": args.quant, "budget": args.budget, "batch": args.batch, "length": args.length}
    results = report(args.model, args.rank, **options)
    yield results.numbers
    formats = results.numbers["formats"].items()
    files = (f"{name}: {tensors['bits']:.3g} bits a weight, {as_size(tensors['bytes'])}" for name, tensors in formats)
    layers, ranks = results.kinds["all"].layers, results.numbers["ranks"]
    adapted = sum(math.prod(layer.shape) for layer in layers)
    print_row("model", f"{args.model}: {len(layers)} layers of {adapted:,} parameters to adapt")
    print_row("files", "; ".join(files))
    how = "as PiSSA's own decomposition finds them: never above the true ones"
    print_row("spectrum", f"the first {results.suggestion.largest_rank} singular values, {how}")
    header = ("energy held by rank", "layers", "shape", "stable\nrank", *(f"\n{rank}" for rank in ranks))
    rows = []
    for kind, summary in results.kinds.items():
        shapes = {" x ".join(map(str, layer.shape)) for layer in summary.layers}
        shape = shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes"
        stable = as_range([round(layer.stable_rank) for layer in summary.layers])
        rows.append([kind, str(len(summary.layers)), shape, stable, *(f"{summary.energy(rank):.1%}" for rank in ranks)])
    print(f"\n{format_table(header, rows)}\n")
    held = {layer.name: Summary([layer]).energy(ranks[0]) for layer in layers}
    rows = [[name, f"{held[name]:.1%}"] for name in sorted(held, key=held.__getitem__)[:5]]
    print(format_table((f"least energy held by rank {ranks[0]}", ""), rows) + "\n")
    best, even = results.suggestion, results.suggestion.uniform
    print_row("ranks", f"for {best.budget:,} parameters: {best.parameters:,} lose {best.lost:.2%} of the energy;")
    print_row("", f"rank {even['r']} in every layer: {even['parameters']:,} lose {even['lost']:.2%}")
    if at_most := sum(rank >= best.largest_rank for rank in best.ranks.values()):
        looked = f"{at_most} layers have rank {best.largest_rank}, the largest that was looked at"
        print_row("", f"{looked}; give --rank a larger one to look further")
    pattern = f", rank_pattern={json.dumps(best.rank_pattern)}" if best.rank_pattern else ""
    print(f"\nPissaConfig(r={best.r}{pattern})\n")
    memory = results.numbers["memory"]
    step = f"a step at rank {memory['rank']}, {memory['batch']} x {memory['length']} tokens"
    for part, label in (("plain", step), ("checkpointing", "with gradient checkpointing")):
        sizes = {name: as_size(size) for name, size in memory[part].items()}
        adapter = as_size(sum(memory[part][name] for name in ("start", "trained", "gradients", "optimizer")))
        parts = f"weights {sizes['weights']}, adapter and AdamW {adapter}, activations {sizes['activations']}"
        print_row("memory", f"{label}: about {sizes['total']} ({parts})")
    print_row("time", f"{results.numbers['seconds']:.0f} s")


REPORT = FolderCommand(_add_arguments, _report)
