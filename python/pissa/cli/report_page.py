"""A report as one HTML page that needs nothing else: tables, pictures as SVG; light and dark, narrow and wide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from pissa.checkpoints.layer_report import LayerReport, Summary, by_kind
from pissa.checkpoints.quant_errors import PLAIN
from pissa.checkpoints.report import Report
from pissa.cli.report_words import MEMORY_PARTS, count, notes, paste, ranks_in_words, shape_of
from pissa.cli.terminal import as_size

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1a1a1b; --soft: #5b5b60; --line: #d7d7d8; --paper: #ffffff; --box: #f4f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececee; --soft: #a2a2a9; --line: #3c3c42; --paper: #161618; --box: #212125; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 1.2rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft, figcaption, caption { color: var(--soft); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0 0; }
dl div { background: var(--box); border-radius: 6px; padding: .55rem .8rem; }
dt { color: var(--soft); font-size: .82rem; line-height: 1.3; }
dd { margin: .1rem 0 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem 2rem;
  align-items: start; }
.beside > * { min-width: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-size: .88rem; padding: 0 0 .3rem; }
th, td { padding: .22rem .9rem .22rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; line-height: 1.25; }
thead th { border-bottom: 1px solid var(--line); }
tbody th { font-weight: 400; }
tr > :last-child { padding-right: 0; }
tr.sum > * { border-top: 1px solid var(--line); font-weight: 600; }
figure { margin: 0; }
.beside .wide + *, .beside figure + * { margin-top: 1.2rem; }
figure svg { display: block; width: 100%; max-width: 32rem; height: auto; }
figcaption { font-size: .88rem; }
pre { background: var(--box); border-radius: 6px; padding: .7rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
summary { cursor: pointer; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="soft">$subtitle</p>
<dl>$facts</dl>
$sections
</body>
</html>
""")


def page(report: Report, pictures: dict[str, str]) -> str:
    """The page. `pictures` are SVG elements, by the names that `report_pictures.pictures` gives them."""
    adapted = sum(math.prod(layer.shape) for layer in report.layers)
    spectra = "all singular values" if report.exact else f"the first {report.known} singular values of each"
    sections = [_energy(report, pictures), _ranks(report), _memory(report), _layers(report)]
    if report.quant is not None:
        sections.insert(1, _errors(report, pictures))
    return _PAGE.substitute(
        title=escape(f"PiSSA report of {Path(report.model).resolve().name}"),
        subtitle=escape(
            f"{report.model}: {len(report.layers)} layers with {count(adapted)} parameters to adapt; {spectra}. Made "
            f"in {report.seconds:.0f} s."
        ),
        facts="".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(report)),
        sections="\n".join(sections),
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    rank = report.ranks[0]
    facts = [
        (f"energy held by rank {rank}", f"{report.whole.energy(rank):.1%}"),
        (f"trained at rank {rank}", count(sum(layer.parameters(rank) for layer in report.layers))),
        ("memory of a training step, with gradient checkpointing", as_size(report.memory[True].total)),
    ]
    if report.quant is not None:
        methods = [method for method in report.whole.methods if method[1] == rank]
        best = max(methods, key=lambda method: report.whole.removed(method)[0])
        facts.insert(1, (f"error of {report.quant} removed by {best[0]}", f"{report.whole.removed(best)[0]:.1%}"))
    return facts


def _energy(report: Report, pictures: dict[str, str]) -> str:
    rows = []
    for kind, some in {**by_kind(report.layers), "all": report.whole}.items():
        energies = [f"{some.energy(rank):.1%}" for rank in report.ranks]
        rows.append([kind, str(len(some.layers)), shape_of(some), *energies])
    table = _table("Energy held by rank", ["", "layers", "shape", *map(str, report.ranks)], rows, total=True)
    return _section(
        "Energy",
        "The energy that rank r holds is the share of ‖W‖² in the first r singular values: what PiSSA trains, and what "
        "a rank-r matrix can represent at best.",
        _beside(
            table + _figure(pictures["energy"], "Energy held at each rank, by kind of layer."),
            _figure(pictures["spectra"], "Spectra, by kind: each line is a layer."),
        ),
    )


def _errors(report: Report, pictures: dict[str, str]) -> str:
    kinds = {kind: some for kind, some in by_kind(report.layers).items() if some.quantised} | {"all": report.whole}
    removed, errors = "", ""
    for rank in report.ranks:
        methods = [method for method in report.whole.methods if method[1] == rank]
        header = ["", *(name for name, _ in methods)]
        rows = [[kind, *(f"{some.removed(method)[0]:.1%}" for method in methods)] for kind, some in kinds.items()]
        removed += _table(f"Error removed, rank {rank}", header, rows, total=True)
        methods.insert(0, (PLAIN, 0))
        header.insert(1, PLAIN)
        rows = [[kind, *(f"{some.error(method):.2%}" for method in methods)] for kind, some in kinds.items()]
        errors += _table(f"Error, rank {rank}", header, rows, total=True)
    picture = _figure(pictures["errors"], "Error removed, by kind of layer and method.")
    details = f"<details><summary>The errors themselves, in Frobenius norms</summary>{errors}</details>"
    return _section(f"Error of {report.quant}", " ".join(notes(report)), _beside(removed + details, picture))


def _ranks(report: Report) -> str:
    found = report.suggestion
    return _section(
        "Ranks",
        ranks_in_words(found),
        f"<pre>{escape(paste(found))}</pre>",
    )


def _memory(report: Report) -> str:
    rows = [
        [words, *(as_size(getattr(report.memory[checkpointing], part)) for checkpointing in (False, True))]
        for part, words in MEMORY_PARTS.items()
    ]
    header = ["", "memory", "with gradient checkpointing"]
    caption = f"Rank {report.ranks[0]}, {report.batch} x {report.length} tokens"
    return _section(
        "Memory of training",
        "Stored tensors are counted; activations are estimated, from what the adapted layers keep and the logits. "
        "Python and torch take about 0.4 GB besides.",
        _table(caption, header, rows, total=True),
    )


def _layers(report: Report) -> str:
    rank = report.ranks[0]
    methods = [method for method in report.whole.methods if method[1] in (0, rank)]
    header = ["layer", "shape", "norm", "stable rank", f"energy, rank {rank}", "suggested rank"]
    header += [f"{name} error" for name, _ in methods]
    rows = [_layer_row(report, layer, rank, methods) for layer in report.layers]
    table = _table("", header, rows)
    return f"<h2>Layers</h2><details><summary>All {len(report.layers)} layers</summary>{table}</details>"


def _layer_row(report: Report, layer: LayerReport, rank: int, methods: Sequence[tuple[str, int]]) -> list[str]:
    some = Summary([layer])
    return [
        layer.name,
        shape_of(some),
        f"{math.sqrt(layer.spectrum.total):.4g}",
        f"{layer.spectrum.stable_rank:.1f}",
        f"{some.energy(rank):.1%}",
        str(report.suggestion.ranks[layer.name]),
        *(f"{some.error(method):.2%}" if layer.errors else "" for method in methods),
    ]


def _section(title: str, text: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2><p>{escape(text)}</p>{content}"


def _beside(*columns: str) -> str:
    """Columns; one below the other on a narrow screen."""
    return f'<div class="beside">{"".join(f"<div>{column}</div>" for column in columns)}</div>'


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = False) -> str:
    """A table. With `total` the last row is the sum of the others."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = []
    for number, (first, *cells) in enumerate(rows):
        mark = ' class="sum"' if total and number == len(rows) - 1 else ""
        body.append(
            f'<tr{mark}><th scope="row">{escape(first)}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    titled = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{titled}<thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )
