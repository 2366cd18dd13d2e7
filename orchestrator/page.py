"""The report as one self-contained HTML page: no network, light and dark, readable on a phone and in print."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

from orchestrator.cells import Table, as_html
from orchestrator.charts import Chart, Figure, figure_json, plotly_javascript

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1b1f24; --soft: #5b6470; --line: #d9dee4; --panel: #f5f7f9;
  --accent: #1f5fae; --claim: #eaf2fb; --warn: #fdf0e3; --good: #1d7a46; --bad: #b3372f; --open: #8a6410; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --ink: #e6e9ed; --soft: #a0a8b3; --line: #343a42;
  --panel: #1c2026; --accent: #8ab8f2; --claim: #1a2736; --warn: #33261a; --good: #6fcf97; --bad: #f08a82; --open: #e0b75e; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main, header { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
.question { font-size: 1.1rem; color: var(--soft); margin: 0 0 1.2rem; }
.claim { background: var(--claim); border-left: 4px solid var(--accent); padding: .9rem 1.1rem; margin: 0; font-size: 1.08rem; }
.gates { list-style: none; margin: .8rem 0 0; padding: 0; display: grid; gap: .3rem; }
.gates li { padding-left: 5.2rem; position: relative; overflow-wrap: anywhere; }
.gates b { position: absolute; left: 0; }
.met b { color: var(--good); } .not b { color: var(--bad); } .open b { color: var(--open); }
.problems { background: var(--warn); border-left: 4px solid #d98324; padding: .7rem 1.1rem .7rem 2.2rem; margin: 1rem 0 0; overflow-wrap: anywhere; }
.problems.one { list-style: none; padding-left: 1.1rem; }
nav { margin: 1.2rem 0 0; display: flex; flex-wrap: wrap; gap: .3rem 1rem; font-size: .92rem; }
a { color: var(--accent); }
a.at { color: inherit; text-decoration: underline dotted var(--soft); text-underline-offset: .2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; min-width: min(100%, 44rem); }
th, td { text-align: left; padding: .38rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.summary td { font-weight: 600; background: var(--panel); }
.note { color: var(--soft); font-size: .88rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
.charts { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.chart { min-width: 0; overflow: hidden; }
details { margin-top: 2.4rem; } details h2 { display: inline; } summary { cursor: pointer; margin-bottom: .6rem; }
pre { background: var(--panel); border: 1px solid var(--line); padding: .7rem .9rem; overflow-x: auto; font-size: .85rem; line-height: 1.45; margin: .6rem 0; }
footer { color: var(--soft); font-size: .85rem; margin: 3rem auto 2rem; max-width: 70rem; padding: 0 1.25rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { font-size: 15px; } header { padding-top: 1.4rem; } th, td { padding: .32rem .5rem; }
  .gates li { padding-left: 0; } .gates b { position: static; margin-right: .4rem; } }
@media print { :root { color-scheme: light; --ground: #fff; --ink: #000; --soft: #444; --line: #bbb; --panel: #f3f3f3; --accent: #1f5fae;
  --claim: #f3f6fa; --warn: #fbf3ea; --good: #1d7a46; --bad: #b3372f; --open: #8a6410; }
  nav { display: none !important; } .wide { overflow: visible; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  table { font-size: 7.5pt; } th, td { white-space: normal; padding: .2rem .3rem; min-width: 0; }
  td.number { white-space: nowrap; } td a.path { overflow-wrap: anywhere; } section { break-inside: avoid-page; }
  section.long { break-inside: auto; } tr { break-inside: avoid; } .charts { grid-template-columns: 1fr; } }
"""

THEME = """
const PAPER_WIDTH = 660;  // pixels of a plot on A4 or Letter with a browser's margins
const charts = [...document.querySelectorAll('.chart')];
function theme(node, style) {
  const ink = style.getPropertyValue('--ink').trim(), line = style.getPropertyValue('--line').trim();
  const change = {'font.color': ink, 'font.family': 'system-ui, sans-serif'};
  for (const axis of Object.keys(node.layout).filter(key => /^[xy]axis/.test(key))) {
    Object.assign(change, {[axis + '.gridcolor']: line, [axis + '.linecolor']: line, [axis + '.zeroline']: false,
      [axis + '.tickfont.color']: ink, [axis + '.title.font.color']: ink});
  }
  return Plotly.relayout(node, change);
}
const recolor = () => charts.forEach(node => theme(node, getComputedStyle(document.documentElement)));
for (const node of charts) {
  const figure = JSON.parse(document.getElementById(node.id + '-data').textContent);
  if (node.clientWidth < 520) Object.assign(figure.layout.margin, {l: 48, r: 6});
  Plotly.newPlot(node, figure.data, figure.layout, {responsive: true, displaylogo: false, displayModeBar: false});
}
recolor();
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', recolor);
matchMedia('print').addEventListener('change', recolor);
addEventListener('beforeprint', () => charts.forEach(node => Plotly.relayout(node, {width: PAPER_WIDTH})));
addEventListener('afterprint', () => charts.forEach(node => Plotly.relayout(node, {width: null, autosize: true})));
"""

UNFOLD = """
const folded = () => [...document.querySelectorAll('details')];
const unfold = () => { const found = document.getElementById(location.hash.slice(1)); if (found && found.tagName === 'DETAILS') found.open = true; };
addEventListener('hashchange', unfold);
unfold();
addEventListener('beforeprint', () => folded().forEach(node => { node.dataset.was = node.open; node.open = true; }));
addEventListener('afterprint', () => folded().forEach(node => { node.open = node.dataset.was === 'true'; }));
"""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Commands or a file to be read as they stand, with a sentence before each."""

    title: str
    parts: tuple[tuple[str, str], ...]
    """A sentence, and the text that it introduces; either may be empty."""


@dataclass(frozen=True, kw_only=True)
class GateLine:
    """One rule's outcome, for the head of the page."""

    state: str
    """met, not met or open."""

    text: str


Section = Table | Chart | Listing


def render_page(
    *,
    title: str,
    question: str,
    claim: str,
    gates: Sequence[GateLine],
    problems: Sequence[str],
    sections: Sequence[Section],
    footer: str,
) -> str:
    """The whole page: the claim, its gates and what weakens it, then the sections in their order."""
    bodies = "".join(map(_section, sections))
    nav = "".join(f'<a href="#{anchor(section)}">{html.escape(section.title)}</a>' for section in sections)
    has_plots = any(isinstance(section, Chart) for section in sections)
    plots = f"<script>{plotly_javascript()}</script>\n<script>{THEME}</script>" if has_plots else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
<p class="question">{html.escape(question)}</p>
<p class="claim">{html.escape(claim)}</p>
{_gate_list(gates)}
{_problem_list(problems)}
<nav aria-label="Sections">{nav}</nav>
</header>
<main>
{bodies}
</main>
<footer>{html.escape(footer)}</footer>
<script>{UNFOLD}</script>
{plots}
</body>
</html>
"""


def anchor(section: Section) -> str:
    """The section's identifier in the page."""
    if isinstance(section, Chart):
        return section.name
    return "table-" + section.title.lower().replace(":", "").replace(" ", "-")


def _gate_list(gates: Sequence[GateLine]) -> str:
    items = "".join(
        f"<li class={gate.state.split()[0]}><b>{html.escape(gate.state)}</b> {html.escape(gate.text)}</li>"
        for gate in gates
    )
    return f"<ul class=gates>{items}</ul>" if items else ""


def _problem_list(problems: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
    kind = "problems" if len(problems) > 1 else "'problems one'"
    return f"<ul class={kind}>{items}</ul>" if items else ""


@singledispatch
def _section(section: Section) -> str:
    raise TypeError(f"a page has no section of type {type(section).__name__}")


@_section.register
def _(table: Table) -> str:
    heading, body = f"<h2>{html.escape(table.title)}</h2>", as_html(table)
    if not table.is_long:
        return f'<section id="{anchor(table)}">{heading}{body}</section>\n'
    count = f" <span class=note>{len(table.rows):,} rows</span>"
    return f'<section class=long><details id="{anchor(table)}"><summary>{heading}{count}</summary>{body}</details></section>\n'


@_section.register
def _(chart: Chart) -> str:
    plots = "".join(_plot(f"chart-{chart.name}-{i}", figure) for i, figure in enumerate(chart.figures))
    note = f"<p class=note>{html.escape(chart.note)}</p>" if chart.note else ""
    return f'<section id="{chart.name}"><h2>{html.escape(chart.title)}</h2><div class=charts>{plots}</div>{note}</section>\n'


@_section.register
def _(listing: Listing) -> str:
    parts = "".join(
        (f"<p>{html.escape(sentence)}</p>" if sentence else "") + (f"<pre>{html.escape(text)}</pre>" if text else "")
        for sentence, text in listing.parts
    )
    return f'<section id="{anchor(listing)}" class=long><h2>{html.escape(listing.title)}</h2>{parts}</section>\n'


def _plot(name: str, figure: Figure) -> str:
    place = f'<div class="chart" id="{name}" style="min-height:{figure.layout.height}px"></div>'
    return f'{place}<script type="application/json" id="{name}-data">{figure_json(figure)}</script>'
