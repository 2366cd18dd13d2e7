"""Cells: numbers as text, and tables of them in their three forms: terminal, Markdown, HTML.

A number is formatted here and nowhere else, so the three forms cannot disagree.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ABSENT = "–"
LINK_ROOT = "../../../"
"""From a study's report folder up to CADDIE_HOME, for links to the files that numbers come from."""


@dataclass(frozen=True)
class Link:
    """A cell that names a file under CADDIE_HOME, or a number with the place that it was read from."""

    path: str
    text: str = ""
    """What is shown, where it is not the path."""

    line: int = 0
    """Line of the number in the file, from 1; 0 where the whole file is meant."""

    pointer: str = ""
    """JSON pointer of the number in the file."""

    def __str__(self) -> str:
        return self.text or self.path or ABSENT

    @property
    def place(self) -> str:
        """File and line, as editors and reviewers write them."""
        return f"{self.path}:{self.line}" if self.line else self.path

    @property
    def target(self) -> str:
        """The link's address, relative to a report."""
        return f"{LINK_ROOT}{self.path}" + (f"#L{self.line}" if self.line else "")


Cell = str | Link


@dataclass(frozen=True, kw_only=True)
class Table:
    """A heading, columns and text cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    """What a reader must know to read it: conventions, units."""

    summary_rows: int = 0
    """Last rows that summarise those above."""

    is_long: bool = False
    """Whether the page may keep it folded: a list to look things up in."""


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def bpb(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.5f}"


def signed(value: float | None) -> str:
    """A difference in bits per byte, with a true minus sign."""
    return ABSENT if value is None else f"{value:+.5f}".replace("-", "−")


def whole(value: float | None) -> str:
    """A count or a number of bytes, with thousands separators."""
    return ABSENT if value is None else f"{round(value):,}"


def seconds(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.1f}"


def probability(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}"


def knob_text(value: Any) -> str:
    """A knob's value, to four significant digits where it is a float."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def params_text(params: dict[str, Any]) -> str:
    return ", ".join(f"{knob} = {knob_text(value)}" for knob, value in params.items()) or "unchanged"


def is_number(cell: Cell) -> bool:
    """Whether a cell belongs to the right of its column."""
    text = str(cell)
    return text == ABSENT or text.replace("−", "-").replace(",", "").lstrip("+-").replace(".", "", 1).isdigit()


def _is_numeric_column(table: Table, index: int) -> bool:
    cells = [row[index] for row in table.rows[: len(table.rows) - table.summary_rows]]
    return all(is_number(cell) for cell in cells if str(cell))


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_text(table: Table) -> str:
    """Aligned columns for a terminal."""
    grid = [table.columns, *[tuple(str(cell) for cell in row) for row in table.rows]]
    widths = [max(len(row[i]) for row in grid) for i in range(len(table.columns))]
    right = [_is_numeric_column(table, i) for i in range(len(table.columns))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in grid
    ]
    rule = "─" * max(map(len, lines))
    body = [lines[0], rule, *lines[1:]]
    if table.summary_rows:
        body.insert(len(body) - table.summary_rows, rule)
    return "\n".join([table.title, "", *body, *(["", table.note] if table.note else [])])


def as_markdown(table: Table) -> str:
    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    def cell(value: Cell) -> str:
        return f"[{value}]({value.target})" if isinstance(value, Link) and value.path else str(value)

    rule = ["---:" if _is_numeric_column(table, i) else ":---" for i in range(len(table.columns))]
    first_summary = len(table.rows) - table.summary_rows
    rows = [
        line(f"**{cell(c)}**" if i >= first_summary and str(c) else cell(c) for c in row)
        for i, row in enumerate(table.rows)
    ]
    return "\n".join(
        [f"## {table.title}", "", line(table.columns), line(rule), *rows, *(["", table.note] if table.note else [])]
    )


def as_html(table: Table) -> str:
    """A table that scrolls sideways on a narrow screen, its numbers aligned."""
    numeric = [_is_numeric_column(table, i) for i in range(len(table.columns))]

    def cells(values: Iterable[Cell], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if is_right else ''}>{_html_cell(value)}</{tag}>"
            for value, is_right in zip(values, numeric, strict=True)
        )

    first_summary = len(table.rows) - table.summary_rows
    rows = [
        f"<tr{' class=summary' if i >= first_summary else ''}>{cells(row, 'td')}</tr>"
        for i, row in enumerate(table.rows)
    ]
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    head, body = cells(table.columns, "th"), "\n".join(rows)
    return (
        f"<div class=wide tabindex=0><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>{note}"
    )


def _html_cell(value: Cell) -> str:
    if not isinstance(value, Link) or not value.path:
        return html.escape(str(value))
    what = f"{value.place} {value.pointer}".rstrip()
    title = f' title="{html.escape(what)}"' if value.line else ""
    kind = "at" if value.line else "path" if not value.text else "name"
    return f'<a class={kind} href="{html.escape(value.target)}"{title}>{html.escape(str(value))}</a>'
