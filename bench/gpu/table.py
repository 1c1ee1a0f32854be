"""What was measured: records, one line of JSON each, and the table of bench/speed.md. It does not need torch.

python -m bench.gpu.table LOG RESULTS.json TREE    # prints the table, writes the rows; TREE is of the sources now
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.compare.records import write

STAGES = ("start", "linear", "nf4", "decode", "models")  # of rows
BROKEN = 3  # the exit status of a process in which the GPU computes nothing more
_COLUMNS = "work | against | goal | peer / ours (quartiles) | ours, ms | peer, ms"
HEAD = f"| {_COLUMNS} |\n|{'---|' * (_COLUMNS.count('|') + 1)}"


def records(path: Path) -> list[dict[str, Any]]:
    """The records that bench.gpu.measure has written. An empty list if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def line(result: Mapping[str, Any]) -> str:
    """A row of the table, from a result as a record stores it."""
    goal = "" if result["goal"] is None else f"{result['goal']:g}"
    start = f"| {result['work']} | {result['against']} | {goal} |"
    if result["failed"]:
        return f"{start} FAILED: {result['note'].replace('|', '/')} | | |"
    ours = result["ours_median_ms"]
    if result["no_peer"]:
        return f"{start} | {ours:.3g} | no peer: {result['no_peer'].replace('|', '/')} |"
    ratio, (lower, upper) = result["ratio_median"], result["ratio_quartiles"]
    shown = f"**{ratio:.2f}**" if result["goal"] is not None and ratio >= result["goal"] else f"{ratio:.2f}"
    return f"{start} {shown} ({lower:.2f} to {upper:.2f}) | {ours:.3g} | {result['peer_median_ms']:.3g} |"


def main() -> None:
    """Of a row the last record: what older sources' rows measured stays until it is measured again, and says so."""
    log, results, tree = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    found = records(log)
    rows = {
        r["name"]: {"tree": r["tree"], "name": r["name"], "stage": r["stage"]} | r["row"] for r in found if "row" in r
    }
    machines = {r["tree"]: {"tree": r["tree"], **r["machine"]} for r in found if "machine" in r}
    write(results, {"tree": tree, "machines": [*machines.values()], "rows": [*rows.values()]})
    print(
        ", ".join(f"{name} {value}" for name, value in machines.get(tree, {}).items() if name not in ("tree", "date"))
    )
    if rows:
        print("", HEAD, sep="\n")
    for row in rows.values():
        print(line(row) + ("" if row["tree"] == tree else f"  (of older sources, {row['tree']})"))


if __name__ == "__main__":
    main()
