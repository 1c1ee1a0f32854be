"""The kinds of a model's layers: what those of all blocks have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """The kind of each layer, by its name: what follows the last number in the name, as short as tells kinds apart:
    "q_proj", or "attn.c_proj" beside "mlp.c_proj"."""
    whole = {name: _after_last_number(name) for name in names}
    kinds = {kind: kind[-1:] for kind in whole.values()}
    for kind in kinds:
        for length in range(1, len(kind) + 1):
            kinds[kind] = kind[-length:]
            if not any(other[-length:] == kinds[kind] for other in kinds if other != kind):
                break
    return {name: ".".join(kinds[kind]) for name, kind in whole.items()}


def sample(kinds: Mapping[str, str], count: int) -> set[str]:
    """The names of at most `count` layers of each kind, the first and the last among them (of one, the middle), evenly
    spaced. `kinds` is what `kinds_of` returns, in the order of the model."""
    members: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        members.setdefault(kind, []).append(name)
    chosen = set()
    for names in members.values():
        last = len(names) - 1
        if count == 1:
            chosen.add(names[last // 2])
        else:
            chosen |= {names[round(i * last / (count - 1))] for i in range(count)}
    return chosen


def _after_last_number(name: str) -> tuple[str, ...]:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return tuple(parts[numbers[-1] + 1 :] if numbers else parts)
