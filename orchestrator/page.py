"""The report as one self-contained HTML page: no network, light and dark, readable on a phone and in print."""

from __future__ import annotations

import html
from collections.abc import Sequence

from orchestrator.charts import Chart, Figure, figure_json, plotly_javascript
from orchestrator.tables import Table, as_html

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1b1f24; --soft: #5b6470; --line: #d9dee4; --panel: #f5f7f9;
  --accent: #1f5fae; --claim: #eaf2fb; --warn: #fdf0e3; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --ink: #e6e9ed; --soft: #a0a8b3; --line: #343a42;
  --panel: #1c2026; --accent: #8ab8f2; --claim: #1a2736; --warn: #33261a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main, header { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
.question { font-size: 1.1rem; color: var(--soft); margin: 0 0 1.2rem; }
.claim { background: var(--claim); border-left: 4px solid var(--accent); padding: .9rem 1.1rem; margin: 0; font-size: 1.08rem; }
.problem { background: var(--warn); border-left: 4px solid #d98324; padding: .7rem 1.1rem; margin: 1rem 0 0; overflow-wrap: anywhere; }
nav { margin: 1.2rem 0 0; display: flex; flex-wrap: wrap; gap: .3rem 1rem; font-size: .92rem; }
a { color: var(--accent); }
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
footer { color: var(--soft); font-size: .85rem; margin: 3rem auto 2rem; max-width: 70rem; padding: 0 1.25rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { font-size: 15px; } header { padding-top: 1.4rem; } th, td { padding: .32rem .5rem; } }
@media print { :root { --ground: #fff; --ink: #000; --soft: #444; --line: #bbb; --panel: #f3f3f3; --accent: #1f5fae;
  --claim: #f3f6fa; --warn: #fbf3ea; } nav { display: none !important; } .wide { overflow: visible; }
  table { font-size: 7.5pt; } th, td { white-space: normal; padding: .2rem .3rem; }
  td.number { white-space: nowrap; } td a { overflow-wrap: anywhere; } section { break-inside: avoid-page; }
  .charts { grid-template-columns: 1fr; } }
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


def render_page(
    *,
    title: str,
    question: str,
    claim: str,
    problems: Sequence[str],
    tables: Sequence[Table],
    charts: Sequence[Chart],
    footer: str,
) -> str:
    """The whole page: the claim and the records first, then the plots, then every number behind them."""
    records = [table for table in tables if table.summary_rows]
    others = [table for table in tables if not table.summary_rows]
    sections = [*map(_table_section, records), *map(_chart_section, charts), *map(_table_section, others)]
    links = [
        *((_anchor(t.title), t.title) for t in records),
        *((c.name, c.title) for c in charts),
        *((_anchor(t.title), t.title) for t in others),
    ]
    nav = "".join(f'<a href="#{anchor}">{html.escape(name)}</a>' for anchor, name in links)
    warnings = "".join(f"<p class=problem>{html.escape(problem)}</p>" for problem in problems)
    plots = f"<script>{plotly_javascript()}</script>\n<script>{THEME}</script>" if charts else ""
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
{warnings}
<nav aria-label="Sections">{nav}</nav>
</header>
<main>
{"".join(sections)}
</main>
<footer>{html.escape(footer)}</footer>
{plots}
</body>
</html>
"""


def _anchor(title: str) -> str:
    return "table-" + title.lower().replace(":", "").replace(" ", "-")


def _table_section(table: Table) -> str:
    return f'<section id="{_anchor(table.title)}"><h2>{html.escape(table.title)}</h2>{as_html(table)}</section>\n'


def _chart_section(chart: Chart) -> str:
    plots = "".join(_plot(f"chart-{chart.name}-{i}", figure) for i, figure in enumerate(chart.figures))
    note = f"<p class=note>{html.escape(chart.note)}</p>" if chart.note else ""
    return f'<section id="{chart.name}"><h2>{html.escape(chart.title)}</h2><div class=charts>{plots}</div>{note}</section>\n'


def _plot(name: str, figure: Figure) -> str:
    place = f'<div class="chart" id="{name}" style="min-height:{figure.layout.height}px"></div>'
    return f'{place}<script type="application/json" id="{name}-data">{figure_json(figure)}</script>'
