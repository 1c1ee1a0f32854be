"""Instructions per multiply-accumulate in the inner loops of a kernel object, from its disassembly.

    python -m bench.inner_loops build/aarch64/CMakeFiles/pissa_kernels_neonbf16.dir/cpp/pissa/cpu/kernels.cc.o

A loop is a backward branch inside a function. An inner loop is one that contains no other. The GEMM's micro-kernel is
the loop with the most multiply-accumulates. At best a loop contains only these. Prints a Markdown table for
bench/NOTES.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections import Counter
from dataclasses import dataclass

MULTIPLY_ACCUMULATES = ("fmla", "bfdot", "vfmadd", "vdpbf16ps")
LEAST = 16  # of them in a loop: fewer are not products of matrices

FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^\s+([0-9a-f]+):\s+(\S+)\s*(.*)$")
BRANCH_TARGET = re.compile(r"(?:^|\s)([0-9a-f]+) <")


@dataclass(frozen=True)
class Loop:
    function: str
    counts: Counter[str]  # of mnemonics

    @property
    def multiply_accumulates(self) -> int:
        return sum(n for name, n in self.counts.items() if name.startswith(MULTIPLY_ACCUMULATES))

    @property
    def ratio(self) -> float:
        return self.counts.total() / self.multiply_accumulates


def inner_loops(function: str, instructions: list[tuple[int, str, str]]) -> list[Loop]:
    index = {address: i for i, (address, _, _) in enumerate(instructions)}
    loops = []
    for i, (_, name, operands) in enumerate(instructions):
        target = BRANCH_TARGET.search(operands) if name.startswith(("b", "cb", "tb", "j")) else None
        first = index.get(int(target[1], 16), i + 1) if target else i + 1
        if first <= i:
            loops.append((first, i))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [Loop(function, Counter(name for _, name, _ in instructions[first : last + 1])) for first, last in inner]


def read(objdump: str, path: str) -> list[Loop]:
    text = subprocess.run(
        [objdump, "-dC", "--no-show-raw-insn", path], check=True, capture_output=True, text=True
    ).stdout
    loops: list[Loop] = []
    function, instructions = "", []
    for line in [*text.splitlines(), "0 <>:"]:
        if start := FUNCTION.match(line):
            loops += inner_loops(function, instructions)
            function, instructions = start[1], []
        elif match := INSTRUCTION.match(line):
            instructions.append((int(match[1], 16), match[2], match[3]))
    return [loop for loop in loops if loop.multiply_accumulates >= LEAST]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("object")
    parser.add_argument("--objdump", default="aarch64-linux-gnu-objdump")
    args = parser.parse_args()
    loops = sorted(read(args.objdump, args.object), key=lambda loop: -loop.multiply_accumulates)
    print("| function | multiply-accumulates | instructions | ratio | the others |\n|---|---|---|---|---|")
    for loop in loops:
        name = re.sub(r"\(.*", "", loop.function.replace("(anonymous namespace)::", "").replace("pissa::cpu::", ""))
        others = (f"{n} {x}" for x, n in loop.counts.most_common() if not x.startswith(MULTIPLY_ACCUMULATES))
        counts = f"{loop.multiply_accumulates} | {loop.counts.total()} | {loop.ratio:.3f}"
        print(f"| `{name}` | {counts} | {', '.join(others)} |")


if __name__ == "__main__":
    main()
