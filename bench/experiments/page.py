"""The page: README.md and its pictures, made only from the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.experiments.experiment import Cell, Experiment, Known, Options
from bench.experiments.figures import Figure, save

CONCLUSIONS = "conclusions.md"
"""Beside README.md: what people conclude from it, inserted at its start."""
EARLIER = "earlier.md"
"""The sections of studies whose programs are no longer here, inserted at its end."""

_HEAD = """\
# The paper's claims, every method at its best rate

The claims of PiSSA's paper (arXiv 2404.02948v4), tested on models and data that two cores can train. The conclusions \
come first; behind them, each experiment has a section with its tables. [PROTOCOL.md](PROTOCOL.md) has the rules, \
which were fixed before the runs.
"""

_READING = """\
## How to read the tables

A number is a mean over seeds ± their deviation, at the rate with the least held-out loss of seed 0. **Bold** is \
better than all others by more than two standard errors of the difference. Differences are taken seed by seed, because \
a seed draws the order of the data for all methods alike. With three seeds that is a confidence of 82%: one in five \
such differences is chance. A dash stands for a number that is not known yet. Losses are in nats.

This page is made from `bench/results/experiments/*.jsonl` and its conclusions:

    # this page again
    python -m bench.experiments --only-page
    # the cells that are missing
    python -m bench.experiments --data gsm8k=DIR reviews=DIR
    # all of it again, elsewhere
    python -m bench.experiments --data … --results DIR --page DIR
"""


def write_page(experiments: Sequence[Experiment], known: Known, options: Options, folder: Path) -> None:
    """Writes README.md, and pictures into pictures/. The same results give the same bytes."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    wanted = {experiment.name: list(dict.fromkeys(experiment.wanted(known, options))) for experiment in experiments}
    parts = [_HEAD]
    if (conclusions := folder / CONCLUSIONS).exists():
        parts.append(conclusions.read_text(encoding="utf-8"))
    parts.append(_READING + _sums({cell: None for cells in wanted.values() for cell in cells}, known))
    for experiment in experiments:
        section = experiment.section(known, options)
        for name, figure in section.pictures.items():
            save(figure, pictures / name)
        shown = [f"![{_alternative(figure)}](pictures/{name})" for name, figure in section.pictures.items()]
        parts += [_title(experiment, wanted[experiment.name], known), section.text, *shown]
    if (earlier := folder / EARLIER).exists():
        parts.append(earlier.read_text(encoding="utf-8"))
    (folder / "README.md").write_text("\n\n".join(part.strip("\n") for part in parts) + "\n", encoding="utf-8")


def _alternative(figure: Figure) -> str:
    """For those who do not see the picture: what its panels show."""
    panels = [
        (axes.get_ylabel(), axes.get_xlabel(), axes.get_title(loc="left") or axes.get_title()) for axes in figure.axes
    ]
    names = [" against ".join(filter(None, (y, x))) or "values" for y, x, _ in panels]
    return "; ".join(f"{name}: {title}" if title else name for name, (*_, title) in zip(names, panels, strict=True))


def _sums(cells: Iterable[Cell], known: Known) -> str:
    """How much was run, and where."""
    records = [known.record(cell) for cell in cells if cell in known]
    hours = sum(record["seconds"]["processor"] for record in records) / 3600
    machines = sorted({f"{record['machine']['model name']} ({record['machine']['isa']})" for record in records})
    where = f" on {', '.join(machines)}, one thread each" if machines else ""
    return f"\n{len(records):,} cells took {hours:.1f} hours of a processor{where}.\n"


def _title(experiment: Experiment, cells: Sequence[Cell], known: Known) -> str:
    records = [known.record(cell) for cell in cells if cell in known]
    seconds = sum(record["seconds"]["processor"] for record in records)
    count = (
        f"{len(records)} cells" if len(records) == len(cells) else f"**{len(records)} of {len(cells)} cells so far**"
    )
    return "\n\n".join(
        [
            f"## {experiment.title}",
            f"**In the paper**: {experiment.claim}.",
            f"`python -m bench.experiments {experiment.name} --data …`: {count}, {seconds:,.0f} CPU seconds (some "
            "shared with other sections).",
        ]
    )
