"""Markdown tables of means over seeds. Only what differs is bold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bench.experiments.sweep import Spread

MISSING = "—"
"""In the place of what is not known yet."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column on the left, the others on the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """A number with that many digits after the point. A dash for None and for numbers that are not finite."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:{'+' if sign else ''}.{digits}f}"


def rate(value: float | None) -> str:
    """A learning rate: 5e-4."""
    if value is None:
        return MISSING
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def measured(spread: Spread | None, digits: int = 4, bold: bool = False) -> str:
    """Mean ± deviation of the seeds. Only the mean for one seed, "diverged" if it is infinite."""
    if spread is None:
        return MISSING
    if math.isinf(spread.mean):
        return "diverged"
    text = number(spread.mean, digits)
    if spread.n > 1:
        text += f" ± {number(spread.deviation, digits)}"
    return f"**{text}**" if bold else text


def count(spread: Spread | None) -> str:
    """The number of seeds."""
    return MISSING if spread is None else str(spread.n)


def differ(one: Spread, other: Spread) -> bool:
    """Whether the mean of the differences, seed by seed, is more than two of its standard errors from 0; never so with
    one seed."""
    gap = one.less(other)
    return gap.n > 1 and abs(gap.mean) > 2 * gap.error


def difference(one: Spread | None, other: Spread | None, digits: int = 4) -> str:
    """`one` less `other` ± two standard errors, which one seed does not have; bold if they differ and it shows."""
    if one is None or other is None:
        return MISSING
    gap = one.less(other)
    if not math.isfinite(gap.mean):
        return MISSING
    shown = round(gap.mean, digits) + 0.0  # which -0.0 is without
    text = number(shown, digits, sign=True)
    if gap.n > 1:
        text += f" ± {number(2 * gap.error, digits)}"
    return f"**{text}**" if shown != 0 and differ(one, other) else text


def winner(spreads: Mapping[str, Spread | None], largest: bool = False) -> str | None:
    """The method that is better than all others by more than two standard errors of the difference, or None."""
    known = {name: spread for name, spread in spreads.items() if spread is not None}
    if len(known) < 2:
        return None
    first = (max if largest else min)(known, key=lambda name: known[name].mean)
    others = [spread for name, spread in known.items() if name != first]
    return first if all(differ(known[first], spread) for spread in others) else None


def column(spreads: Mapping[str, Spread | None], digits: int = 4, largest: bool = False) -> dict[str, str]:
    """A column of a table by method: mean ± deviation, the winner in bold. The best is the least, or the largest."""
    best = winner(spreads, largest)
    return {name: measured(spread, digits, name == best) for name, spread in spreads.items()}
