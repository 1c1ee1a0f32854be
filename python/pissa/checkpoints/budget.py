"""Ranks for a budget of parameters, which keep as much of the weights' energy as the budget allows; and kinds of
layers, whose ranks a configuration can name together."""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A layer to be given a rank."""

    gains: Sequence[float]
    """The gain of each further rank, not increasing. The layer's rank is at most their number, at least one step."""
    cost: int
    """The number of parameters for each rank: in + out."""


def allocate(layers: Sequence[Candidate], budget: int, step: int = 8) -> list[int]:
    """The rank of each layer: at least `step`, and a multiple of `step` or all that the layer has, with at most
    `budget` parameters in total.

    Every layer begins with one step. Then the step with the largest gain per parameter is taken, repeatedly, until none
    fits. Because a layer's gains do not increase, no other ranks gain more with as many parameters as had been spent
    when the first step did not fit. With the whole budget, no other ranks gain more than the result plus that step.
    (Choosing better is a knapsack problem; the two differ by less than one step of one layer.) Raises as
    `check_budget`.
    """
    spent = check_budget([(len(layer.gains), layer.cost) for layer in layers], budget, step)
    ranks = [min(step, len(layer.gains)) for layer in layers]

    def steps(number: int) -> Iterator[tuple[float, int, int]]:
        """Yields, for a layer: the negative gain per parameter, the layer, and by how much the rank grows."""
        gains, cost = layers[number]
        for rank in range(step, len(gains), step):
            more = gains[rank : rank + step]
            yield -sum(more) / (len(more) * cost), number, len(more)

    done = set()
    for _, number, more in heapq.merge(*map(steps, range(len(layers)))):
        cost = more * layers[number].cost
        if number in done or spent + cost > budget:
            done.add(number)
        else:
            ranks[number] += more
            spent += cost
    return ranks


def check_budget(layers: Iterable[tuple[int, int]], budget: int, step: int) -> int:
    """Returns the parameters for one step in each layer, given each layer's largest rank and parameters per rank.

    Raises:
        ValueError: the budget is smaller.
    """
    least = sum(min(step, most) * cost for most, cost in layers)
    if least > budget:
        raise ValueError(f"budget: got {budget:,} parameters; needed: at least {least:,}, rank {step} in each layer")
    return least


def as_pattern(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Returns `r` and `rank_pattern` of a PissaConfig that gives the named layers these ranks.

    `r` is the most frequent rank. A kind of layers has its own key if another rank is more frequent in it. Before that
    key (PEFT takes the first that matches) come those of its layers that differ: one key for all layers of one rank
    whose names differ in the first number. Later numbers, of experts, match any number if all of these layers agree.
    """
    r = Counter(ranks.values()).most_common(1)[0][0]
    kinds = kinds_of(ranks)
    pattern: dict[str, int] = {}
    for kind, names in kinds.items():
        # A kind whose name is the end of another kind's name cannot be distinguished from it.
        own = not any(other.endswith(f".{kind}") for other in kinds)
        usual = Counter(ranks[name] for name in names).most_common(1)[0][0] if own else r
        shared = defaultdict[tuple[str, str, str], set[int]](set)
        for name in names:
            shared[_parts(name, any_later=True)].add(ranks[name])
        alike = defaultdict[tuple[int, str, str], dict[str, None]](dict)
        for name in names:
            if ranks[name] != usual:
                before, number, after = _parts(name, any_later=len(shared[_parts(name, any_later=True)]) == 1)
                alike[ranks[name], before, after][number] = None
        for (rank, before, after), numbers in alike.items():
            either = "|".join(numbers)
            pattern[f"^{before}{f'({either})' if len(numbers) > 1 else either}{after}"] = rank
        if usual != r:
            pattern[re.escape(kind)] = usual
    return r, pattern


def _parts(name: str, *, any_later: bool) -> tuple[str, str, str]:
    """Splits a name for a pattern: the part before its first number, the number, and the rest. Without a number, all of
    it is before. With `any_later`, further numbers match any number."""
    before, number, after = re.fullmatch(r"(.*?)((?<![^.])\d+(?![^.])|$)(.*)", name).groups()  # type: ignore[union-attr]
    rest = (r"\d+" if any_later and part.isdigit() else re.escape(part) for part in after.split("."))
    return re.escape(before), number, r"\.".join(rest)


# ---- Kinds of layers -------------------------------------------------------------------------------------------------


def kinds_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of each kind of layers. A kind is what follows the last number in a name, as short as distinguishes the
    kinds: "q_proj", or "attn.c_proj" and "mlp.c_proj"."""
    by_ending = defaultdict[tuple[str, ...], list[str]](list)
    for name in names:
        parts = name.split(".")
        start = max((i + 1 for i, part in enumerate(parts[:-1]) if part.isdigit()), default=0)
        by_ending[tuple(parts[start:])].append(name)
    kinds = {}
    for ending, of_kind in by_ending.items():
        lengths = range(1, len(ending) + 1)
        alone = (n for n in lengths if not any(other[-n:] == ending[-n:] for other in by_ending if other != ending))
        kinds[".".join(ending[-next(alone, len(ending)) :])] = of_kind
    return kinds
