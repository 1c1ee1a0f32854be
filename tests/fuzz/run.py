"""Fuzzes one parser, or all of them one after the other, with atheris: `python tests/fuzz/run.py MINUTES [PARSER ...]`.

An input for which fuzzing.check raises is a crash: it is written to the working folder, and the run ends with 1.
Inputs that reach new code are kept in build/fuzz, from where the next run goes on.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzzing

KEPT = Path("build") / "fuzz"
"""Of each parser the inputs that were found."""

DEEP = "nested deeply"
"""Stands for lists in lists, more than Python's json would write."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, 2**31, 2**63 - 1, 2**64, 10**400, 1e308, float("nan"), float("inf")),
    *(DEEP, "", "\0", "\ud800", "x" * 300, "../x", "F32", "F4", "__metadata__", "(", "(.*)+$"),
    *([], {}, [[]], [{}], {"": {}}),
)
"""Values that a parser may not expect."""


def changed(value: Any, dice: random.Random) -> Any:
    """A value of JSON with one place in it changed."""
    if isinstance(value, (dict, list)) and value and dice.random() < 0.9:
        places = list(value) if isinstance(value, dict) else range(len(value))
        place, copy = dice.choice(places), value.copy()
        action = dice.random()
        if action < 0.1:
            del copy[place]
        elif action < 0.2 and isinstance(copy, list):
            copy.insert(place, changed(copy[place], dice))
        elif action < 0.2:
            copy[str(dice.choice(ODD))] = copy[place]
        else:
            copy[place] = changed(copy[place], dice)
        return copy
    if isinstance(value, int) and dice.random() < 0.5:
        return value + dice.choice([-1, 1, 8, -8])
    if isinstance(value, str) and value and dice.random() < 0.5:
        place = dice.randrange(len(value))
        return value[:place] + dice.choice([".", "0", "9", "a", "é", "\ud83d", ""]) + value[place + 1 :]
    return dice.choice(ODD)


def mutated(data: bytes, header: int, dice: random.Random) -> bytes | None:
    """The input with one of its objects of JSON changed; None if it has none."""
    end = header + int.from_bytes(data[:header], "little") if header else len(data)
    lines = data[header:end].split(b"\n")
    for part in [0] if len(lines) == 1 else [None, dice.randrange(len(lines))]:
        try:
            value = json.loads(data[header:end] if part is None else lines[part])
            text = json.dumps(changed(value, dice), ensure_ascii=dice.random() < 0.5).encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):
            continue
        text = text.replace(json.dumps(DEEP).encode(), (depth := dice.randrange(3000)) * b"[" + depth * b"]")
        if part is not None:
            text = b"\n".join([*lines[:part], text, *lines[part + 1 :]])
        return (len(text).to_bytes(header, "little") if header else b"") + text + data[end:]
    return None


def fuzz(name: str, seconds: int) -> None:
    """Fuzzes one parser in this process, which ends here."""
    import atheris

    with atheris.instrument_imports(include=["pissa", "parsers"]):
        module = fuzzing.parser(name)
    header = getattr(module, "HEADER", 0)
    folder, kept = KEPT / f"{name}-files", KEPT / name
    for path in (folder, kept):
        path.mkdir(parents=True, exist_ok=True)

    def one(data: bytes) -> None:
        if len(data) <= fuzzing.LARGEST:
            fuzzing.check(module, data, folder)

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        dice = random.Random(seed)
        found = mutated(data, header, dice) if dice.random() < 0.7 else None
        return atheris.Mutate(data, size) if found is None or len(found) > size else found

    limits = [f"-max_total_time={seconds}", f"-max_len={fuzzing.LARGEST}", "-timeout=300", "-print_final_stats=1"]
    found = [f"-artifact_prefix={KEPT}/{name}-", *limits, str(kept), str(fuzzing.CORPUS / name)]
    atheris.Setup([sys.argv[0], *found], one, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    minutes, names = float(sys.argv[1]), sys.argv[2:] or fuzzing.PARSERS
    if len(names) == 1:
        fuzz(names[0], round(60 * minutes))
    failed = [name for name in names if subprocess.run([sys.executable, __file__, str(minutes), name]).returncode]
    print(f"failed: {', '.join(failed)}" if failed else f"no crash: {', '.join(names)}, {minutes:g} minutes each")
    return len(failed) > 0


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main())
