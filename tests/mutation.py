"""Mutation tests of python/pissa: which planted faults the tests find, and which tests find one that no other does.

    PYTHONPATH=python python tests/mutation.py [--rooms ops layers] [--every 7] [--first 0] [--out build/mutation]

runs the tests once, notes by coverage.py (`pip install coverage`) which lines of the rooms each one reaches, and then
plants faults, one at a time: each in a fork of a process that has collected the tests, where the functions get the
code of the changed source. A mutant meets the tests that reach its line: the fastest of each file first, until they
have taken SECONDS, and, if none of these fails, the others until they have taken PATIENCE. It is killed by a test that
fails, or by time. The results are lines of JSON in OUT/mutants.jsonl, to which a later run with another --first adds;
the tables come last. Code outside of functions is not changed.

The operators: `compare` (< and <=, > and >=, == and !=, `is`, `in` and their opposites), `arithmetic` (+ and -, * and
/, // to *, % to *, ** to *, @ with its operands exchanged), `logic` (and, or, not), `choice` (`a if c else b`
exchanged), `number` (n + 1; a float doubled; True and False), `drop` (a call whose value is not used, a `raise`, or an
assignment to an attribute, to an element or in place).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

SECONDS, PATIENCE = 6.0, 60.0
"""Of the tests of one mutant, by the times that they took without it."""

ROOT = Path(__file__).parents[1]
ROOMS = ("ops", "base", "layers", "model", "adapters", "containers", "checkpoints")

OPPOSITES: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult},
}


# ---- Mutants ----


def changed(node: ast.AST) -> tuple[str, ast.AST] | None:
    """The name of the operator that fits this node, and what the node becomes."""
    new: Any = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[operator]):
            new.ops = [OPPOSITES[type(operator)]()]
            return "compare", new
        case ast.BinOp(op=ast.MatMult()):
            new.left, new.right = new.right, new.left
            return "arithmetic", new
        case ast.BinOp(op=operator) if type(operator) in OPPOSITES:
            new.op = OPPOSITES[type(operator)]()
            return "arithmetic", new
        case ast.BoolOp(op=operator):
            new.op = OPPOSITES[type(operator)]()
            return "logic", new
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return "logic", operand
        case ast.IfExp():
            new.body, new.orelse = new.orelse, new.body
            return "choice", new
        case ast.Constant(value=bool(value)):
            return "number", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            return "number", ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            return "number", ast.Constant(value * 2 or 1.0)
        case ast.Raise() | ast.Expr(value=ast.Call()) | ast.AugAssign():
            return "drop", ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return "drop", ast.Pass()
    return None


def places(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, str, int | None]]:
    """(parent, field, index) of each node inside functions; not messages, annotations or defaults, which run apart."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "args", "decorator_list") and not isinstance(node, ast.Call):
            continue
        children = [(i, v) for i, v in enumerate(value)] if isinstance(value, list) else [(None, value)]
        for index, child in children:
            if not isinstance(child, ast.AST):
                continue
            if inside and not isinstance(child, (ast.expr_context, ast.operator, ast.cmpop, ast.boolop, ast.unaryop)):
                yield node, field, index
            if not isinstance(child, (ast.Raise, ast.JoinedStr, ast.Assert)):
                yield from places(child, inside or isinstance(child, (ast.FunctionDef, ast.Lambda)))


def mutants(path: Path) -> Iterator[tuple[int, str, CodeType]]:
    """(line, operator, code of the changed module) of each mutant of a file, in the order of its text."""
    tree = ast.parse(path.read_text())
    for parent, field, index in list(places(tree)):
        slot = getattr(parent, field)
        old = slot if index is None else slot[index]
        if found := changed(old):
            operator, new = found
            ast.copy_location(new, old)
            if index is None:
                setattr(parent, field, new)
            else:
                slot[index] = new
            yield old.lineno, operator, compile(ast.fix_missing_locations(tree), str(path), "exec")
            if index is None:
                setattr(parent, field, old)
            else:
                slot[index] = old


def codes(code: CodeType, path: str = "") -> Iterator[tuple[tuple[str, str, int], CodeType]]:
    """Each function of a module's code under its file, name and line; functions in functions go with the outer one."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield (constant.co_filename, constant.co_name, constant.co_firstlineno), constant
            if not constant.co_flags & 2:  # a class: CO_NEWLOCALS is of functions
                yield from codes(constant)


def planted(code: CodeType, functions: dict[tuple[str, str, int], list[FunctionType]]) -> bool:
    """Gives the functions in this process the changed code; False if none has changed or one cannot take it."""
    any_changed = False
    for key, new in codes(code):
        for function in functions.get(key, ()):
            if function.__code__ != new:
                try:
                    function.__code__ = new
                except ValueError:  # other free variables
                    return False
                any_changed = True
    return any_changed


# ---- In pytest: `-p mutation` with PISSA_MUTATION ----


class Lines:
    """The first run: which tests reach which lines, and how long each takes."""

    def __init__(self, out: Path, shard: int) -> None:
        import coverage

        self.out, self.shard, self.seconds = out, shard, Counter[str]()
        self.coverage = coverage.Coverage(
            data_file=str(out / f"lines-{shard}"), source_pkgs=["pissa"], config_file=False
        )
        self.coverage.start()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.seconds[report.nodeid] = float("inf")  # fails without a mutant: asked no more

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        self.coverage.save()
        (self.out / f"seconds-{self.shard}.json").write_text(json.dumps(self.seconds))


class Mutate:
    """The second run: a fork for each mutant."""

    def __init__(self, out: Path, shard: int, work: list[tuple[str, int]]) -> None:
        self.out, self.shard, self.work = out, shard, set(map(tuple, work))
        self.failed: list[str] = []
        from coverage import CoverageData

        self.reached: dict[tuple[str, int], set[str]] = defaultdict(set)
        for data in map(CoverageData, map(str, out.glob("lines-*"))):
            data.read()
            for file in data.measured_files():
                for line, tests in data.contexts_by_lineno(file).items():
                    self.reached[file, line].update(filter(None, tests))
        self.seconds: dict[str, float] = {}
        for file in out.glob("seconds-*.json"):
            self.seconds |= json.loads(file.read_text())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items if self.seconds.get(item.nodeid, 1e9) < PATIENCE}
        functions: dict[tuple[str, str, int], list[FunctionType]] = defaultdict(list)
        for path in sorted({path for path, _ in self.work}):  # what is imported at its first use
            importlib.import_module(
                ".".join(Path(path).relative_to(ROOT / "python").with_suffix("").parts).removesuffix(".__init__")
            )
        for thing in gc.get_objects():
            if isinstance(thing, FunctionType) and "/pissa/" in thing.__code__.co_filename:
                functions[thing.__code__.co_filename, thing.__code__.co_name, thing.__code__.co_firstlineno].append(
                    thing
                )
        gc.freeze()
        for path in sorted({path for path, _ in self.work}):
            for number, (line, operator, code) in enumerate(mutants(Path(path))):
                if (path, number) in self.work:
                    self.run(path, line, operator, number, code, items, functions)
        return True

    def run(self, path: str, line: int, operator: str, number: int, code: CodeType, items: Any, functions: Any) -> None:
        tests = [test for test in self.reached[path, line] if test in items]
        queue = sorted(tests, key=self.seconds.__getitem__)
        rank: Counter[str] = Counter()
        order = {}
        for test in queue:  # the fastest of each file before the second of any
            file = test.split("::")[0]
            order[test] = (rank[file], self.seconds[test])
            rank[file] += 1
        queue.sort(key=order.__getitem__)
        name = f"{Path(path).relative_to(ROOT / 'python/pissa')}:{line} {operator} #{number}"
        entry: dict[str, Any] = {"mutant": name, "reached": len(tests), "ran": [], "killed": []}
        if tests:
            entry |= self.forked(code, queue, items, functions)
        with (self.out / f"mutants-{self.shard}.jsonl").open("a") as file_:
            file_.write(json.dumps(entry) + "\n")

    def forked(self, code: CodeType, queue: list[str], items: Any, functions: Any) -> dict[str, Any]:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os.dup2(1, 2)
            done: dict[str, Any] = {"skipped": True}
            if planted(code, functions):
                done = {"ran": [], "killed": []}
                spent = 0.0
                for test, after in zip(queue, [*queue[1:], None], strict=True):
                    self.started(writer, test)
                    item = items[test]
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=items.get(after))
                    spent += self.seconds[test]
                    done["ran"].append(test)
                    if spent > (SECONDS if self.failed else PATIENCE):
                        break
                done["killed"] = sorted(set(self.failed))
            os.write(writer, b"\n" + json.dumps(done).encode())
            os._exit(0)
        os.close(writer)
        return self.waited(child, reader)

    @staticmethod
    def started(writer: int, test: str) -> None:
        os.write(writer, b"\n" + json.dumps({"killed": [test], "time": True, "ran": [test]}).encode())

    def waited(self, child: int, reader: int) -> dict[str, Any]:
        """What the fork wrote last; a test that it had begun and not ended has killed the mutant."""
        last, buffer, limit = {"skipped": True}, b"", time.monotonic() + 4 * PATIENCE
        while True:
            ready, _, _ = select.select([reader], [], [], max(0.0, min(limit - time.monotonic(), 60)))
            piece = os.read(reader, 1 << 16) if ready else b""
            if not piece:  # its end, or a minute without a test that ends
                break
            buffer += piece
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if lines := [line for line in buffer.split(b"\n") if line]:
            last = json.loads(lines[-1])
        return last


def pytest_configure(config: pytest.Config) -> None:
    if plan := os.environ.get("PISSA_MUTATION"):
        told = json.loads(plan)
        plugin = (Lines if told["work"] is None else Mutate)(
            Path(told["out"]), told["shard"], *filter(None, [told["work"]])
        )
        config.pluginmanager.register(plugin)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    told = json.loads(os.environ.get("PISSA_MUTATION", "{}"))
    if told.get("work", ()) is None:
        files = sorted({item.path for item in items})
        mine = set(files[told["shard"] :: told["shards"]])
        items[:] = [item for item in items if item.path in mine]


# ---- The two runs and the tables ----


def run(out: Path, works: list[list[tuple[str, int]] | None], tests: list[str]) -> None:
    processes = []
    for shard, work in enumerate(works):
        plan = {"out": str(out), "shard": shard, "shards": len(works), "work": work}
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        environment = {**os.environ, **threads, "PISSA_MUTATION": json.dumps(plan)}
        environment["PYTHONPATH"] = f"{ROOT / 'python'}:{ROOT / 'tests'}"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "mutation", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += ["-o", "tmp_path_retention_policy=none", f"--basetemp={out / f'tmp-{shard}'}", *tests]
        with (out / f"log-{shard}").open("a") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    for process in processes:
        process.wait()


def tables(out: Path) -> None:
    by_room: dict[str, Counter[str]] = defaultdict(Counter)
    alive, alone, killers = [], Counter[str](), Counter[str]()
    for line in (entry for file in sorted(out.glob("mutants-*.jsonl")) for entry in file.read_text().splitlines()):
        entry = json.loads(line)
        room = by_room[entry["mutant"].split("/")[0]]
        if entry.get("skipped"):
            continue
        room["mutants"] += 1
        room["not reached"] += not entry["reached"]
        room["killed"] += bool(entry["killed"])
        if not entry["killed"]:
            alive.append(entry["mutant"] + ("" if entry["reached"] else " (not reached)"))
        killers.update(entry["killed"])
        if len(entry["killed"]) == 1:
            alone.update(entry["killed"])
    print("| room | mutants | killed | not reached | % killed |\n|---|---|---|---|---|")
    for name, room in sorted(by_room.items()):
        share = 100 * room["killed"] / max(room["mutants"], 1)
        print(f"| {name} | {room['mutants']} | {room['killed']} | {room['not reached']} | {share:.1f} |")
    (out / "alive.txt").write_text("\n".join(sorted(alive)) + "\n")
    (out / "tests.tsv").write_text("".join(f"{alone[t]}\t{n}\t{t}\n" for t, n in sorted(killers.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", nargs="+", default=ROOMS, choices=ROOMS)
    parser.add_argument("--every", type=int, default=1, help="plant one of so many mutants")
    parser.add_argument("--first", type=int, default=0, help="begin with this one")
    parser.add_argument("--tests", nargs="+", default=["tests/python"], help="the tests to use")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutation")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not list(out.glob("seconds-*.json")):
        run(out, [None] * args.jobs, args.tests)
    work = []
    for room in args.rooms:
        for path in sorted((ROOT / "python" / "pissa" / room).glob("*.py")):
            work += [(str(path), number) for number, _ in enumerate(mutants(path))]
    work = work[args.first :: args.every]
    print(f"{len(work)} mutants", flush=True)
    run(out, [work[job :: args.jobs] for job in range(args.jobs)], args.tests)
    tables(out)


if __name__ == "__main__":
    main()
