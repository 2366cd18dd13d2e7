import csv
import json
import re
from html.parser import HTMLParser

import pytest
from make_study import (
    BUNDLE,
    CODE,
    SMOKE,
    Maker,
    confirm,
    make_record,
    make_study,
    put_verdict,
    sampled_params,
    search,
    with_event_line,
)

from orchestrator import ledger
from orchestrator.evidence import gather
from orchestrator.presets import load_preset
from orchestrator.report import claim, render_text, write_report
from orchestrator.runs import RunRequest
from orchestrator.statistics import difference
from trainer import protocol

NAME = "wd-qk-ttt-smoke"


class Page(HTMLParser):
    """Collects what a page would load, its identifiers and its tables' rows."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.ids, self.headings, self.targets, self._tag = [], set(), [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._tag = tag
        attributes = dict(attrs)
        if "id" in attributes:
            self.ids.add(attributes["id"])
        if "src" in attributes or (tag == "link" and not attributes["href"].startswith("data:")):
            self.loads.append(attributes)
        if tag == "a":
            self.targets.append(attributes["href"])

    def handle_data(self, data):
        if self._tag == "h2" and data.strip():
            self.headings.append(data.strip())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study and its report, for tests that only read."""
    home = make_study(tmp_path_factory.mktemp("finished"))
    return home, write_report(home, NAME)


def test_a_report_is_five_files_in_the_studys_folder(finished):
    home, report = finished
    names = {path.name for path in home.study(NAME).report.iterdir()}
    assert names == {"report.html", "report.md", "report.json", "record.csv", "runs.csv"}
    assert report.page == home.study(NAME).report_page


def test_the_page_loads_nothing_from_anywhere(finished):
    _, report = finished
    text = report.page.read_text()
    assert Page(text).loads == []
    assert "@import" not in text.split("<script>")[0]
    assert not re.search(r"url\(", text.split("<script>")[0])


def test_the_page_holds_every_plot_and_table_and_each_link_leads_somewhere(finished):
    home, report = finished
    page = Page(report.page.read_text())
    assert page.headings == [
        "Gates", "Record: best", "Record: preset", "Seeds", "Bits per byte by stage", "Tests", "At equal steps and equal time",
        "Loss by step", "Loss by seconds", "Loss by tokens", "Trials and best so far", "Score and size", "Value by knob",
        "Knob importance", "Bytes by group", "Knobs", "Stages", "Bytes", "Phases", "Throughput", "Trials", "Started runs",
        "The whole family", "Cited lines", "What it was made of", "Cost by phase", "How to repeat it",
    ]  # fmt: skip
    for target in page.targets:
        if target.startswith("#"):
            assert target[1:] in page.ids
        else:
            path, _, line = target.partition("#L")
            text = (home.study(NAME).report / path).resolve().read_text()
            assert not line or int(line) <= text.count("\n")


def test_a_number_of_the_record_links_to_the_line_that_it_stands_on(finished):
    home, report = finished
    run = report.evidence.arms[0].runs[0]
    line = run.lines["/scores/ttt/bpb"]
    source = (home.root / run.source).read_text().splitlines()
    assert source[line - 1].strip() == f'"bpb": {run.bpb("ttt")},'
    shown = f"[{run.bpb('ttt'):.5f}](../../../{run.source}#L{line})"
    record = report.text.read_text().split("## Record: preset")[0]
    assert shown in record
    title = f'title="{run.source}:{line} /scores/ttt/bpb"'
    assert title in report.page.read_text()
    with report.record_csv.open() as file:
        row = next(csv.DictReader(file))
    assert int(row["ttt_bpb_line"]) == line
    assert json.loads(report.data.read_text())["arms"][0]["runs"][0]["lines"]["ttt_bpb"] == line


def test_every_rule_stands_under_the_claim_with_what_is_missing(finished):
    _, report = finished
    text = report.page.read_text()
    head = text[: text.index("<main>")]
    for verdict in report.comparison.verdicts:
        assert verdict.gate.name in head
        assert verdict.gate.name in render_text(report)
    assert head.index('class="claim"') < head.index("<ul class=gates>") < head.index("<nav")
    gates = json.loads(report.data.read_text())["comparison"]["verdicts"]
    assert [gate["gate"]["name"] for gate in gates] == ["pg-readme", "pg-readme-constant", "pg-leaderboard"]
    assert all(gate["missing"] for gate in gates if not gate["is_met"])


def test_a_record_is_compared_with_what_it_should_beat(tmp_path):
    home = make_record(tmp_path)
    assert write_report(home, "record-smoke").comparison is None
    report = write_report(home, "record-smoke", against="2.5", gates=["pg-readme-constant"])
    [verdict] = report.comparison.verdicts
    assert verdict.is_met
    assert "record-smoke:preset against 2.5: difference −0." in report.claim
    assert "met: pg-readme-constant" in render_text(report)
    assert "record-smoke:preset against 2.5" in report.text.read_text()


def test_the_page_says_how_to_repeat_it(finished):
    home, report = finished
    text = report.text.read_text()
    run = report.evidence.arms[0].runs[0]
    assert "caddie study run study.toml" in text
    assert f"caddie verify {run.run_id}" in text
    command = next(line for line in text.splitlines() if line.startswith("caddie run smoke --seeds 42,314,999"))
    assert f"--set optim.muon_weight_decay={report.evidence.arms[0].params['optim.muon_weight_decay']}" in command
    assert report.evidence.state.source.strip() in text
    assert "0123456789ab" in text  # the code's commit
    assert home.run(run.run_id).spec.relative_to(home.root).as_posix() in text


def test_runs_of_the_family_that_the_record_does_not_show_are_listed_and_said(tmp_path):
    home = make_record(tmp_path)
    maker = Maker(tmp_path, SMOKE.replace("wd-qk-ttt-smoke", "another"))
    extra = RunRequest(
        preset="smoke", config=load_preset("smoke"), seed=7, data_dir="/data/pydoc", manifest_sha256="ab" * 32,
        study="another",
    )  # fmt: skip
    maker.complete(maker.store.plan(extra, bundle=BUNDLE, code=CODE))
    report = write_report(home, "record-smoke", against="2.5", gates=["pg-readme-constant"])
    assert [(run.seed, run.study) for run in report.family] == [
        (7, "another"), (42, "record-smoke"), (314, "record-smoke"), (999, "record-smoke"),
    ]  # fmt: skip
    assert any("of the same configuration, seed 7, study another: complete" in text for text in report.weaknesses)
    assert any("4 runs of the configuration were started, 3 are compared" in text for text in report.weaknesses)
    [verdict] = report.comparison.verdicts
    assert verdict.adjusted_p == pytest.approx(2 * verdict.difference.p_one_sided)
    assert set(report.weaknesses) >= set(write_report(home, "record-smoke").weaknesses)
    assert any("seed 7, study another" in text for text in write_report(home, "record-smoke").weaknesses)
    row = next(line for line in report.text.read_text().splitlines() if line.startswith("| preset | 7 |"))
    assert "| no |" in row


def test_runs_of_the_search_are_not_held_against_the_record(finished):
    _, report = finished
    assert report.comparison.candidate.started == 3
    assert not [text for text in report.weaknesses if "not shown" in text]
    assert any(run.seed == 1 for run in report.family)


def test_equal_steps_and_equal_seconds_compare_the_losses_on_the_way(finished):
    _, report = finished
    text = report.text.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| training loss at equal")]
    assert [row.split("|")[1].strip() for row in rows] == [
        "training loss at equal steps", "training loss at equal seconds",
    ]  # fmt: skip
    assert rows[0].split("|")[2].strip() == "120"


def test_throughput_is_of_the_training_loop(finished):
    _, report = finished
    text = report.text.read_text()
    row = next(line for line in text[text.index("## Throughput") :].splitlines() if line.startswith("| best | 42"))
    assert "| 180.00 |" in row  # 21.6 s of 120 steps
    assert f"| {120 * 4096 / 21.6:,.0f} |" in row


def test_markup_in_a_studys_text_is_shown_and_not_run(tmp_path):
    home = Maker(tmp_path, SMOKE.replace("Do Muon's", "<script>alert(1)</script> Do Muon's")).home
    text = write_report(home, NAME).page.read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_the_record_table_has_the_authors_form_a_row_a_seed_mean_and_spread(finished):
    _, report = finished
    lines = render_text(report).splitlines()
    start = lines.index("Record: best")
    assert lines[start + 2].split("  ")[-1].strip() == "Artifact bytes"
    assert re.split(r"\s{2,}", lines[start + 2].strip()) == [
        "Seed",
        "Steps",
        "Sliding BPB",
        "TTT BPB",
        "TTT gain",
        "Artifact bytes",
    ]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[start + 4 : start + 10]]
    assert [row[0] for row in rows] == ["42", "314", "999", rows[3][0], "mean of 3", "std (n−1)"]
    assert rows[0][5] == "455,274"
    values = [float(row[3]) for row in rows[:3]]
    assert float(rows[4][3]) == pytest.approx(sum(values) / 3, abs=1e-5)  # five decimals are shown


def test_the_spread_of_the_record_divides_by_n_minus_one(finished):
    _, report = finished
    summary = report.evidence.arms[0].summary("ttt")
    row = next(line for line in render_text(report).splitlines() if line.startswith("std (n−1)"))
    assert f"{summary.std:.5f}" in row
    assert "sample standard deviation, n - 1" in report.text.read_text()


def test_the_claim_gives_difference_interval_and_says_within_noise(finished):
    _, report = finished
    evidence = report.evidence
    expected = difference(evidence.arms[0].values("ttt"), evidence.arms[1].values("ttt"))
    assert expected.contains_zero
    assert f"a difference of {expected.value:+.5f}".replace("-", "−") in report.claim
    assert "95% Welch interval" in report.claim
    assert "3 and 3 seeds" in report.claim
    assert "within noise, the interval contains zero." in report.claim


def test_the_claim_also_pairs_the_seeds_and_shows_their_correlation(finished):
    _, report = finished
    paired = report.evidence.paired_improvement
    shown = f"{paired.difference.value:+.5f}".replace("-", "−")
    assert f"correlate by {paired.correlation:.2f}: {shown}" in report.claim
    assert json.loads(report.data.read_text())["paired_improvement"]["correlation"] == paired.correlation


@pytest.mark.parametrize(("shift", "word"), [(-0.5, "better"), (0.5, "worse")])
def test_a_clear_difference_is_called_better_or_worse(tmp_path, shift, word):
    home = make_study(tmp_path)
    for run in gather(home, NAME).arms[0].runs:
        path = home.root / run.source
        result = json.loads(path.read_text())
        result["scores"]["ttt"]["bpb"] += shift
        path.write_text(json.dumps(result))
    assert f"{word} than the preset, the interval excludes zero" in claim(gather(home, NAME))


def test_a_seed_without_a_result_keeps_its_row_with_the_reason(tmp_path):
    report = write_report(make_study(tmp_path, failing_seed=314), NAME)
    row = next(line for line in render_text(report).splitlines() if line.strip().startswith("314"))
    assert "failed: not_finite: the loss is not a number at step 31" in row
    assert "mean of 2" in render_text(report)
    assert "best, seed 314 has no score" in " ".join(report.problems)
    with report.record_csv.open() as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == "best"]
    assert [(row["seed"], row["state"], row["ttt_bpb"] == "") for row in rows] == [
        ("42", "complete", False), ("314", "failed", True), ("999", "complete", False),
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "is_told"), [(protocol.TIMEOUT, True), (protocol.NOT_FINITE, False)])
def test_a_failed_seed_that_another_attempt_may_mend_has_its_remedy(tmp_path, kind, is_told):
    maker = Maker(tmp_path)
    search(maker, 1)
    runs = maker.ask_arm("preset", 0, maker.study.preset_params(), (42, 314))
    maker.complete(runs[42])
    maker.fail(runs[314], kind, "it went wrong")
    maker.append(ledger.CLOSED, reason="finished")
    text = render_text(write_report(maker.home, NAME))
    assert (f"once their cause is mended: caddie study retry {NAME}" in text) == is_told


def test_one_complete_seed_has_no_interval_and_nothing_follows(tmp_path):
    maker = Maker(tmp_path)
    search(maker, 2)
    for name, number in (("preset", 0), ("best", 1)):
        for run in maker.ask_arm(name, number, sampled_params(maker.study, number), (42,)).values():
            maker.complete(run)
    assert "too few seeds, or no spread, for an interval, so nothing follows" in claim(gather(maker.home, NAME))


def test_a_study_in_the_middle_reports_that_its_best_is_not_confirmed(tmp_path):
    report = write_report(make_study(tmp_path, stage="search"), NAME)
    assert report.claim.startswith("Not confirmed: the best of 4 scored trials is trial 1")
    assert "The study is not finished: this is its state so far." in report.problems
    assert report.page.stat().st_size > 1_000_000


def test_a_study_without_a_run_gives_a_report_that_says_so(tmp_path):
    report = write_report(make_study(tmp_path, stage="opened"), NAME)
    assert report.claim == "There is no TTT BPB yet: no run has ended with a score that keeps the limits."
    assert "Plotly" not in report.page.read_text()


def test_a_preset_that_no_trial_beats_is_confirmed_alone(tmp_path):
    maker = Maker(tmp_path)
    search(maker, 1)
    assert maker.study.confirm is not None
    for run in maker.ask_arm("preset", 0, maker.study.preset_params(), maker.study.confirm.seeds).values():
        maker.complete(run)
    found = claim(gather(maker.home, NAME))
    assert found.startswith("No trial was better than the preset. preset has TTT BPB ")
    assert "over 3 seeds" in found


def test_a_record_attempt_without_a_search_is_reported(tmp_path):
    report = write_report(make_record(tmp_path), "record-smoke")
    assert re.fullmatch(r"preset has TTT BPB 2\.\d{5} ± 0\.\d{5} \(n−1\) over 3 seeds\.", report.claim)
    assert "Trials" not in Page(report.page.read_text()).headings


def test_an_artifact_over_the_cap_is_said_before_the_numbers(tmp_path):
    home = make_study(tmp_path)
    path = home.root / gather(home, NAME).arms[0].runs[2].source
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "artifact_bytes": 500_001}))
    report = write_report(home, NAME)
    assert "best: the artifact is over the cap on seeds 999." in report.problems
    assert "over the cap" in report.text.read_text()


def test_verified_runs_are_marked_in_the_record_and_lead_to_the_check(tmp_path):
    home = make_study(tmp_path)
    first, second, _ = gather(home, NAME).arms[0].runs
    assert "Verified" not in render_text(write_report(home, NAME))
    put_verdict(home, first, "passed")
    put_verdict(home, second, "failed")
    report = write_report(home, NAME)
    lines = render_text(report).splitlines()
    start = lines.index("Record: best")
    assert lines[start + 2].endswith("  Verified")
    assert [line.split()[-1] for line in lines[start + 4 : start + 7]] == ["passed", "failed", "–"]
    assert f"[passed](../../../{gather(home, NAME).arms[0].runs[0].verification})" in report.text.read_text()
    for target in Page(report.page.read_text()).targets:
        assert target.startswith("#") or (home.study(NAME).report / target.partition("#")[0]).resolve().is_file()
    assert f"best, seed 314 failed its clean-room check (runs/{second.run_id}/" in " ".join(report.problems)
    assert [run["verified"] for run in json.loads(report.data.read_text())["arms"][0]["runs"]] == [
        "passed",
        "failed",
        "",
    ]
    with report.record_csv.open() as file:
        assert [row["verified"] for row in csv.DictReader(file) if row["arm"] == "best"] == ["passed", "failed", ""]


def test_audited_runs_are_marked_in_the_record_and_lead_to_the_audit(tmp_path):
    home = make_study(tmp_path)
    first, second, _ = gather(home, NAME).arms[0].runs
    put_verdict(home, first, "passed", audit=True)
    put_verdict(home, second, "failed", audit=True)
    report = write_report(home, NAME)
    lines = render_text(report).splitlines()
    start = lines.index("Record: best")
    assert lines[start + 2].endswith("  Audited")
    assert [line.split()[-1] for line in lines[start + 4 : start + 7]] == ["passed", "failed", "–"]
    assert f"[passed](../../../runs/{first.run_id}/audit.json)" in report.text.read_text()
    assert f"best, seed 314 failed its audit (runs/{second.run_id}/" in " ".join(report.problems)
    assert [run["audited"] for run in json.loads(report.data.read_text())["arms"][0]["runs"]] == [
        "passed",
        "failed",
        "",
    ]


def test_what_the_trainer_warned_of_stands_before_the_numbers(tmp_path):
    home = make_study(tmp_path)
    run = gather(home, NAME).arms[0].runs[1]
    warning = {"kind": "warning", "t": 9.0, "name": "fitted", "grid_factor": 1.03, "pruned": 0}
    with_event_line(home.run(run.run_id).attempts()[-1], json.dumps(warning).encode() + b"\n")
    report = write_report(home, NAME)
    sentence = "best, seed 314: the trainer warned of fitted (grid_factor 1.03, pruned 0)."
    assert sentence in report.problems
    assert f"warning: {sentence}" in render_text(report)
    assert not report.damage


def test_every_started_run_is_listed_with_its_result_file(finished):
    _, report = finished
    text = report.text.read_text()
    started = text[text.index("## Started runs") : text.index("## The whole family")]
    for attempt in report.evidence.attempts:
        assert f"[{attempt.source}](../../../{attempt.source})" in started
    assert started.count("\n| ") == len(report.evidence.attempts) + 2  # heading and rule
    assert "0 GPU-seconds" in started


def test_the_json_form_has_every_number_in_full_and_no_nan(finished):
    home, report = finished
    record = json.loads(report.data.read_text(), parse_constant=pytest.fail)
    run = record["arms"][0]["runs"][0]
    source = json.loads((home.root / run["source"]).read_text())
    assert run["bpb"]["ttt"] == source["scores"]["ttt"]["bpb"]
    assert record["improvement"]["value"] == report.evidence.improvement.value
    assert [trial["state"] for trial in record["trials"]].count("pruned") == 1


def test_the_trials_table_shows_a_violated_constraint(finished):
    _, report = finished
    text = report.text.read_text()
    row = next(line for line in text[text.index("## Trials") :].splitlines() if line.startswith("| 6 |"))
    assert "artifact_bytes +1500" in row


def test_a_damaged_event_line_is_reported_and_the_rest_is_shown(tmp_path):
    home = make_study(tmp_path)
    run = gather(home, NAME).arms[0].runs[0]
    with_event_line(home.run(run.run_id).attempt(1), b"\xff broken\n")
    report = write_report(home, NAME)
    assert any("not a JSON object" in place for place in report.damage)
    assert "not a JSON object" in report.page.read_text()


def test_a_pipe_in_a_reason_does_not_break_the_markdown_table(tmp_path):
    maker = Maker(tmp_path)
    [run] = maker.ask_trial(0, sampled_params(maker.study, 0)).values()
    maker.fail(run, "code", "a | b\nc")
    maker.tell(0, ledger.FAILED, reason="code: a | b\nc")
    row = next(
        line for line in write_report(maker.home, NAME).text.read_text().splitlines() if line.startswith("| 0 | preset")
    )
    assert "code: a \\| b c" in row


def test_writing_a_report_again_replaces_it(tmp_path):
    maker = Maker(tmp_path)
    search(maker, 8)
    first = write_report(maker.home, NAME).claim
    confirm(maker)
    assert first != write_report(maker.home, NAME).claim
