"""What a run leaves, in three files: measurements, a summary to read, and the logs."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from bench.gpu.machine import Machine
from bench.gpu.stages import Outcome, Part
from bench.gpu.state import write
from bench.gpu.table import HEAD, line, records


def first_line(parts: Iterable[Part], outcomes: Mapping[str, Outcome]) -> str:
    """What broke, or that nothing did; then what was not run, and what cannot be on this machine."""
    stages: dict[str, dict[str, list[str]]] = {}  # how -> stage -> why
    left_out: list[str] = []
    for part in parts:
        outcome = outcomes[part.name]
        left_out += [*outcome.left_out, *([outcome.why] if outcome.how == "left out" else [])]
        why = "" if outcome.why.startswith("for lack of") else outcome.why
        stages.setdefault(outcome.how, {}).setdefault(part.stage, []).append(why)
    failed, not_run = stages.get("failed", {}), stages.get("not run", {})
    well = [stage for stage in stages.get("passed", {}) if stage not in {**failed, **not_run}]
    said = [f"FAILED: {_each(failed)}" if failed else f"nothing failed; passed: {', '.join(well) or 'nothing'}"]
    if rest := {stage: why for stage, why in not_run.items() if stage not in failed}:
        said.append(f"not run: {_each(rest)}")
    if left_out:
        said.append(f"left out: {', '.join(dict.fromkeys(left_out))}")
    return "; ".join(said)


def _each(stages: Mapping[str, list[str]]) -> str:
    why = {stage: ", ".join(dict.fromkeys(filter(None, reasons))) for stage, reasons in stages.items()}
    return ", ".join(f"{stage} ({text})" if text else stage for stage, text in why.items())


def measurements(machine: Machine, tree: str) -> dict[str, Any]:
    """The machines and the rows of all records, of a row the last one: what older sources' rows measured stays until it
    is measured again, and says so."""
    found = records(machine.build / "rows.jsonl")
    rows: dict[str, dict[str, Any]] = {}
    for record in found:
        if "row" in record:
            rows[record["name"]] = {name: record[name] for name in ("tree", "name", "stage")} | record["row"]
    machines = {
        record["tree"]: {"tree": record["tree"], **record["machine"]} for record in found if "machine" in record
    }
    return {"tree": tree, "machines": list(machines.values()), "rows": list(rows.values())}


def summary(
    first: str, description: str, parts: Iterable[Part], outcomes: Mapping[str, Outcome], found: Mapping[str, Any]
) -> str:
    """The text for a reader: what broke, the machine, the tests, the table of rows, each part's end."""
    facts = next((m for m in reversed(found["machines"]) if m["tree"] == found["tree"]), {})
    versions = ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("tree", "date"))
    lines = [first, "", description, *filter(None, [versions]), f"sources: {found['tree']}", ""]
    ran = [part for part in parts if part.name in outcomes]
    lines += [note for part in ran for note in outcomes[part.name].notes]
    if found["rows"]:
        lines += ["", HEAD]
        older = {row["tree"]: f"  (of older sources, {row['tree']})" for row in found["rows"]} | {found["tree"]: ""}
        lines += [line(row) + older[row["tree"]] for row in found["rows"]]
    lines += ["", *(_end(part, outcomes[part.name]) for part in ran), ""]
    return "\n".join(lines)


def _end(part: Part, outcome: Outcome) -> str:
    why = f": {outcome.why}" if outcome.why else ""
    return f"{part.stage}, {part.name}: {outcome.how}, {outcome.seconds:.0f} s{why}"


def leave(machine: Machine, tree: str, description: str, parts: list[Part], outcomes: Mapping[str, Outcome]) -> str:
    """Writes the three files anew. Returns the summary's first line."""
    machine.results.mkdir(parents=True, exist_ok=True)
    found = measurements(machine, tree)
    first = first_line((part for part in parts if part.name in outcomes), outcomes)
    text = summary(first, description, parts, outcomes, found)
    found["parts"] = {name: asdict(outcome) for name, outcome in outcomes.items()}
    write(machine.results / f"{machine.name}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write(machine.results / f"{machine.name}_summary.txt", text)
    archive = machine.results / f"{machine.name}_logs.tar.gz"
    partial = archive.with_name(f".{archive.name}")
    with tarfile.open(partial, "w:gz") as tar:
        tar.add(machine.logs, "logs")
    partial.rename(archive)
    return first
