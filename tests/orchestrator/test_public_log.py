from __future__ import annotations

import pytest
from make_public import SP1024, colon_log, loss_of, score_line, short_log, slash_log

from orchestrator.public_log import LoggedRun, read_log
from trainer.protocol import POST_EMA, ROUNDTRIP, SLIDING, TTT


def only(text: str) -> LoggedRun:
    [run] = read_log(text, "train.log")
    return run


def test_each_family_is_told_by_its_lines() -> None:
    assert only(colon_log()).family == "A"
    assert only(slash_log()).family == "B"
    assert only(short_log()).family == "C"


def test_a_text_that_is_no_log_has_no_runs() -> None:
    assert read_log("torch==2.9.1\nbrotli\n", "requirements.txt") == ()
    assert read_log("", "empty.log") == ()


def test_figures_are_in_the_units_of_their_names_with_their_lines() -> None:
    run = only(colon_log(seed=7, steps=9000, seconds=600.04))
    assert run.number("seed") == 7
    assert run.number("steps") == 9000
    assert run.seconds("train_seconds") == 600.04
    assert run.number("peak_memory_bytes") == 10_000 * 2**20
    assert run.number("val_tokens") == 62_021_632
    text = colon_log(seed=7).split("\n")
    assert text[run.figures["seed"].line - 1] == "seed:7"


def test_minutes_and_milliseconds_of_the_slash_family_become_seconds() -> None:
    run = only(slash_log(steps=5000))
    assert run.seconds("train_seconds") == 590.02
    assert run.phases == {"Hessians": 9.8}
    # one decimal of a minute is six seconds: the cumulative rate tells the time
    assert run.curve[1].train_seconds == pytest.approx(500 * 786_432 / 8_000_000)


def test_the_script_inside_a_log_says_nothing() -> None:
    assert only(colon_log()).scores == ()
    assert only(colon_log()).unknown == ()


def test_running_values_are_no_scores() -> None:
    lines = [
        "  ttt_chunk [1389/1389] bpb=1.337303 time=405.0s",
        "ttp: b3/782 bl:3.3383 bb:1.2660 rl:2.7757 rb:1.0755 dl:75-78 gd:1",
        "ttt_progress: batch 1/782 batch_loss:3.3576 batch_bpb:1.2461 running_loss:2.7928 running_bpb:1.0764 doc_len:45-70",
        "  sliding_eval [ 99.1%] 120032/121136 windows running_bpb=1.153003",
    ]
    assert only(slash_log(scores=lines)).scores == ()


def test_a_time_stamp_before_every_line_changes_nothing() -> None:
    plain, stamped = (
        slash_log(stamp=stamp, scores=[score_line("quantized", 1.1)]) for stamp in ("", "1776144156.999 ")
    )
    assert only(stamped).figures == only(plain).figures
    assert only(stamped).scores == only(plain).scores


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("DIAGNOSTIC post_ema", POST_EMA), ("pre-quantization post-ema", POST_EMA),
        ("diagnostic pre-quantization post-ema", POST_EMA), ("final_int8_zlib_roundtrip_exact", ROUNDTRIP),
        ("final_int6_roundtrip", ROUNDTRIP), ("quantized", ROUNDTRIP), ("diagnostic quantized", ROUNDTRIP),
        ("final_ternary_roundtrip", ROUNDTRIP), ("final_INT7_zlib_roundtrip", ROUNDTRIP), ("final_sliding_window_exact", SLIDING),
        ("final_sliding_window_eval_exact stride:64", SLIDING), ("final_int6_sliding_window_exact", SLIDING),
        ("quantized_sliding_window", SLIDING), ("final_sliding", SLIDING), ("final_ttt_lora", TTT), ("final_int8_ttt_lora", TTT),
        ("legal_ttt_exact", TTT), ("final_int6_ttt", TTT), ("quantized_ttt", TTT), ("quantized_ttt_lora", TTT),
        ("quantized_ttt_phased", TTT),
    ],
)  # fmt: skip
def test_a_label_tells_the_stage(line: str, stage: str) -> None:
    [score] = only(slash_log(scores=[score_line(line, 1.08)])).scores
    assert score.stage == stage
    assert (score.bpb, score.digits) == (1.08, 8)


def test_a_label_that_is_not_known_is_named_and_gives_no_score() -> None:
    run = only(slash_log(scores=[score_line("magic_eval", 1.08)]))
    assert run.scores == ()
    assert [label for _, label in run.unknown] == ["magic_eval"]
    assert run.submitted is None


def test_twins_are_one_evaluation_with_all_digits_and_the_time() -> None:
    lines = [
        "final_int6_sliding_window val_loss:2.5252 val_bpb:1.0974 stride:64 eval_time:65493ms",
        "final_int6_sliding_window_exact val_loss:2.52523582 val_bpb:1.09743840",
    ]
    [score] = only(colon_log(scores=lines)).scores
    assert (score.bpb, score.digits, score.seconds) == (1.0974384, 8, 65.493)


def test_a_line_that_repeats_another_for_a_parser_is_no_evaluation() -> None:
    lines = [
        score_line("final_int6_sliding_window_exact", 1.1077),
        score_line("final_int8_zlib_roundtrip_exact", 1.1077),
    ]
    [score] = only(colon_log(scores=lines)).scores
    assert score.stage == SLIDING


def test_a_round_trip_label_after_an_announcement_is_a_sliding_score_and_says_why() -> None:
    lines = [
        "final_eval_mode:sliding_window stride:64 batch_seqs:1024",
        "final_int8_zlib_roundtrip val_loss:2.0135 val_bpb:1.1925 eval_time:69881ms",
        score_line("final_int8_zlib_roundtrip_exact", 1.19250007, ratio=SP1024, seconds=None),
    ]
    assert loss_of(1.19250007, SP1024) == pytest.approx(2.01348383, rel=1e-5)
    [score] = only(colon_log(scores=lines)).scores
    assert (score.stage, score.seconds) == (SLIDING, 69.881)
    assert "announces" in score.why_stage


def test_an_online_score_under_a_round_trip_label_is_of_test_time_training() -> None:
    lines = [
        "final_int8_zlib_roundtrip val_loss:2.9636 val_bpb:1.1473 eval_mode:online_ttt eval_time:0ms",
        "final_int8_zlib_roundtrip_exact val_loss:2.96361204 val_bpb:1.14730259",
    ]
    [score] = only(colon_log(scores=lines)).scores
    assert (score.stage, score.bpb) == (TTT, 1.14730259)


def test_the_order_of_stages_takes_the_highest_and_of_these_the_last() -> None:
    lines = [
        score_line("pre-quantization post-ema", 1.01), score_line("quantized", 1.11),
        score_line("quantized_sliding_window", 1.09), score_line("quantized_ttt", 1.08),
    ]  # fmt: skip
    assert only(slash_log(scores=lines)).submitted.label == "quantized_ttt"  # type: ignore[union-attr]
    assert only(slash_log(scores=lines[:3])).submitted.label == "quantized_sliding_window"  # type: ignore[union-attr]
    assert only(slash_log(scores=lines[:1])).submitted is None  # the averaged weights are in no artifact


def test_a_total_without_a_format_is_not_the_artifact() -> None:
    run = only(colon_log(form=None))
    assert run.number("total_bytes") is None
    assert run.number("unlabelled_total_bytes") == 67_050_000


def test_a_file_of_several_runs_is_divided_where_each_begins() -> None:
    first, second = (
        colon_log(seed=1337, steps=steps, scores=[score_line("final_int6_roundtrip", 1.2)]) for steps in (900, 950)
    )
    runs = read_log(first + second, "train.log")
    assert [run.number("steps") for run in runs] == [900, 950]
    assert runs[1].first_line == first.count("\n") + 2  # the second script's line is the first run's last
    assert runs[0].last_line + 1 == runs[1].first_line


def test_an_evaluation_of_a_stored_model_has_trained_nothing() -> None:
    run = only(slash_log(trains=False, scores=[score_line("quantized_ttt_phased", 1.06)]))
    assert not run.has_trained
    assert run.submitted is not None


def test_a_part_of_the_split_is_noted() -> None:
    run = only(
        colon_log(scores=["  eval: 500 batches (limited)", "final_INT7_zlib_roundtrip val_loss:2.0784 val_bpb:1.2353"])
    )
    assert "only a part" in run.notes[0]
    assert "only a part" in only(slash_log(settings={"val_doc_fraction": 0.2})).notes[0]
    assert not only(slash_log(settings={"val_doc_fraction": 1.0})).notes


def test_settings_are_read_in_each_familys_form() -> None:
    assert only(colon_log()).settings["matrix_lr"] == "0.04"
    assert only(slash_log()).settings["matrix_lr"] == "0.02"
    assert only(short_log()).settings["matrix_lr"] == "0.04"


def test_copies_of_a_run_have_one_fingerprint_and_other_seeds_another() -> None:
    text = colon_log(seed=1, scores=[score_line("final_int6_roundtrip", 1.2)])
    assert read_log(text, "a.log")[0].fingerprint == read_log(text, "b.log")[0].fingerprint
    assert only(text).fingerprint != only(text.replace("seed:1\n", "seed:2\n")).fingerprint
    assert only(text).configuration == only(text.replace("seed:1\n", "seed:2\n")).configuration
