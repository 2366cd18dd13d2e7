import re
import shutil
import subprocess

import pytest
from make_study import make_study

from orchestrator.cells import Link, Table, as_html, as_markdown, as_text
from orchestrator.page import GateLine, Listing, render_page
from orchestrator.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAME = "wd-qk-ttt-smoke"


def table(**changes):
    fields = {"title": "Bytes", "columns": ("Seed", "Bytes"), "rows": (("42", "1,000"),), **changes}
    return Table(**fields)


def page(*sections, **changes):
    fields = {"title": "T", "question": "Q?", "claim": "C.", "gates": [], "problems": [], "footer": "F", **changes}
    return render_page(sections=sections, **fields)


def test_a_long_table_is_folded_and_counted():
    assert "<details" not in page(table())
    text = page(table(is_long=True))
    assert '<details id="table-bytes">' in text
    assert "1 rows" in text


def test_gates_are_a_list_with_a_word_for_their_state():
    lines = [GateLine(state="met", text="a"), GateLine(state="not met", text="b <i>"), GateLine(state="open", text="c")]
    text = page(gates=lines)
    assert re.findall(r"<li class=(\w+)><b>(.*?)</b> (.*?)</li>", text) == [
        ("met", "met", "a"), ("not", "not met", "b &lt;i&gt;"), ("open", "open", "c"),
    ]  # fmt: skip


def test_several_problems_are_one_list():
    assert "<ul class=problems><li>a</li><li>b</li></ul>" in page(problems=["a", "b"])
    assert "<li>" not in page()


def test_commands_stand_as_they_are():
    text = page(Listing(title="How", parts=(("Do:", "caddie run <y>"), ("Only words.", ""))))
    assert "<p>Do:</p><pre>caddie run &lt;y&gt;</pre>" in text
    assert "<p>Only words.</p></section>" in text


def test_a_number_with_a_line_leads_there_in_every_form():
    cell = Link("runs/a/result.json", "1.08", 7, "/scores/ttt/bpb")
    found = table(columns=("Seed", "BPB"), rows=(("42", cell),))
    assert "1.08" in as_text(found) and "result.json" not in as_text(found)
    assert "[1.08](../../../runs/a/result.json#L7)" in as_markdown(found)
    assert 'href="../../../runs/a/result.json#L7" title="runs/a/result.json:7 /scores/ttt/bpb">1.08</a>' in as_html(
        found
    )
    assert "<td class=number><a" in as_html(found)  # it is still a number


def test_a_page_without_plots_loads_no_library():
    assert len(page(table())) < 20_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here to open the page in")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_draws_every_plot_without_network_and_nothing_is_wider_than_the_screen(tmp_path, width):
    path = write_report(make_study(tmp_path / "home"), NAME).page
    text = path.read_text()
    probe = (
        "<script>addEventListener('load', () => setTimeout(() => { const wide = [...document.querySelectorAll('body *')].filter("
        "e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.wide, .charts, pre, nav')).length;"
        "document.title = JSON.stringify([wide, document.querySelectorAll('.chart .main-svg').length > 0, innerWidth]); }, 800));"
        "addEventListener('error', e => document.body.dataset.failed = e.message);</script></body>"
    )
    path.write_text(text.replace("</body>", probe))
    dom = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=6000", f"--window-size={width},2000",
            "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    assert "data-failed" not in dom
    plots = re.findall(r'<div class="chart[^"]*" id="(chart-[\w-]+)"', text)
    for plot in plots:
        drawn = dom[dom.index(f'id="{plot}"') :]
        assert "main-svg" in drawn[: drawn.index("</svg>")], plot
    title = re.search(r"<title>\[(\d+),(\w+),(\d+)\]</title>", dom)
    assert title is not None
    assert title[2] == "true"
    assert int(title[1]) == 0
