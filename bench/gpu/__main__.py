"""Builds for the GPU of this machine, tests there (C++, Python, compute-sanitizer) and measures.

    bash bench/gpu.sh [STAGE...] [--prepared DIR]       # the same as python3 -m bench.gpu
    bash bench/gpu.sh linear --rows "M = 2048"          # after a change: builds what has changed, measures a row
    bash bench/gpu.sh --rehearse                        # all of it, on the simulated GPU and the CPU

Without a STAGE all run, in their order. A second call goes on where the first one stopped: what has passed with these
sources on this card is not repeated unless it is named, nor is a row measured again. DIR is what bench/gpu/prepare.sh
collected, for a machine without package indices; what is installed already is used as it is.

A part that fails does not keep others from running. Results: CARD.json, CARD_summary.txt, CARD_logs.tar.gz, in
bench/results or the folder OUT, written after every part; the summary's first line says what broke. Exit status: 0 if
all that was asked has passed; what cannot run on this machine, for lack of GoogleTest say, is only left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from bench.gpu.machine import ROOT, Machine, describe, environment, find_machine, libraries
from bench.gpu.plan import MEASURED, STAGES, Measuring, parts, wanted
from bench.gpu.stages import Outcome, run_part
from bench.gpu.state import State
from bench.gpu.summary import leave

RESULTS = ROOT / "bench/results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument(
        "--prepared", type=Path, metavar="DIR", help="what bench/gpu/prepare.sh collected, from the root"
    )
    parser.add_argument("--rows", action="append", metavar="TEXT", help="only rows that contain this, or one of these")
    parser.add_argument("--seconds", type=float, default=520, help="for all of it (520)")
    parser.add_argument("--build", type=Path, metavar="DIR", help="the folder to build in (build/gpu)")
    parser.add_argument(
        "--rehearse", action="store_true", help="nothing on the GPU, and everything small: does it run?"
    )
    options = parser.parse_args()
    if unknown := [stage for stage in options.stages if stage not in STAGES]:
        parser.error(f"stages: got {', '.join(unknown)}; allowed: {', '.join(STAGES)}")
    return options


def main() -> int:
    begin = time.monotonic()
    options = arguments()
    build = (options.build or ROOT / ("build/rehearsal" if options.rehearse else "build/gpu")).resolve()
    results = Path(os.environ.get("OUT") or (build / "results" if options.rehearse else RESULTS))
    prepared = options.prepared.resolve() if options.prepared else None
    try:
        machine = find_machine(prepared, build, results, options.rehearse)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    for folder in (machine.logs, machine.site):
        folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(machine.site))  # where it is asked whether a package is here
    state = State(machine)
    if not state.known:
        shutil.rmtree(machine.logs)
        machine.logs.mkdir()
    take_up(machine)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what runs, and leaves what there is
    environment(machine)
    libraries(machine, [*filter(None, sys.path)])
    return run(machine, state, options, begin)


def take_up(machine: Machine) -> None:
    """Takes up the rows that an earlier machine of the kind has measured, if this one has measured none."""
    log = machine.build / "rows.jsonl"
    found = [folder / f"{machine.name}.json" for folder in (machine.results, RESULTS)]
    if log.exists() or not (path := next(filter(Path.exists, found), None)):
        return
    measured = json.loads(path.read_text())
    lines = [{"tree": facts.pop("tree"), "run": "", "machine": facts} for facts in measured["machines"]]
    lines += [
        {**{name: row.pop(name) for name in ("tree", "name", "stage")}, "run": "", "row": row}
        for row in measured["rows"]
    ]
    log.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def run(machine: Machine, state: State, options: argparse.Namespace, begin: float) -> int:
    """Runs what is asked and has not passed yet. Returns the exit status."""
    description = describe(machine)
    print(description, flush=True)
    tree = state.key["tree"]
    measure = Measuring(machine, tree, f"{time.time():.3f}", options.rows or [], bool(options.stages))
    every = parts(machine, measure)
    stages = options.stages or STAGES
    passed = [part.name for part in every if state.passed(part.name)]
    todo = [part for part in wanted(every, stages, passed) if options.stages or part.name not in passed]
    state.parts |= {part.name: Outcome("not run", "not begun") for part in todo}
    try:
        for part in todo:
            left = options.seconds - (time.monotonic() - begin)
            state.parts[part.name] = run_part(part, state.parts, machine.logs, left)
            leave(machine, tree, description, every, state.parts)
            state.write()
    finally:
        first, outcomes = leave(machine, tree, description, every, state.parts), state.parts
        if options.rows:  # not all of these stages have been measured
            state.forget([part.name for part in todo if part.stage in MEASURED])
        state.write()
    print(
        (machine.results / f"{machine.name}_summary.txt").read_text(),
        f"took {time.monotonic() - begin:.0f} s",
        sep="\n",
    )
    print(first)
    asked = [part for part in every if part in todo or part.stage in stages]
    return int(any(outcomes[part.name].how in ("failed", "not run") for part in asked))


if __name__ == "__main__":
    sys.exit(main())
