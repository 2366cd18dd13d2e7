from __future__ import annotations

import json
from pathlib import Path

import pytest
from make_public import CODE, MODEL, SP1024, colon_log, make_folder, score_line, seed_results, short_log, slash_log

from orchestrator.errors import ConfigError
from orchestrator.public_record import PublicRecord, scored_arm
from orchestrator.record_folder import find_records, read_record
from trainer.protocol import ROUNDTRIP, SLIDING, TTT


def ttt_log(seed: int, bpb: float, *, sliding: float | None = None, **more: object) -> str:
    lines = [
        score_line("quantized", bpb + 0.02), score_line("quantized_sliding_window", sliding or bpb + 0.002),
        score_line("quantized_ttt", bpb),
    ]  # fmt: skip
    return slash_log(seed=seed, scores=lines, **more)  # type: ignore[arg-type]


def line_of(log: str, label: str) -> int:
    """Line, from 1, on which a label stands."""
    return next(number for number, line in enumerate(log.split("\n"), start=1) if line.startswith(f"{label} "))


def picks(record: PublicRecord) -> dict[int | None, float | None]:
    return {seed.seed: seed.score.bpb if seed.score else None for seed in record.seeds}


def whats(record: PublicRecord) -> list[str]:
    return [conflict.what for conflict in record.conflicts]


def sound(folder: Path, scores: dict[int, float]) -> Path:
    """A folder in which everything agrees."""
    logs = {f"train_seed{seed}.log": ttt_log(seed, bpb) for seed, bpb in scores.items()}
    center = sum(scores.values()) / len(scores)
    return make_folder(folder, logs, submission=seed_results(scores), readme=f"# Made up\n\nval_bpb {center:.8f}\n")


def test_a_folder_in_which_all_agrees_has_its_scores_and_nothing_else(tmp_path: Path) -> None:
    scores = {42: 1.08, 314: 1.081, 999: 1.082}
    record = read_record(sound(tmp_path / "2026-04-01_Sound", scores))
    assert picks(record) == scores
    assert (record.stage, record.date, record.most_bytes) == (TTT, "2026-04-01", CODE + MODEL)
    assert not record.conflicts
    assert not record.doubts
    assert not record.notes
    assert record.seeds[0].place == f"train_seed42.log:{line_of(ttt_log(42, 1.08), 'quantized_ttt')}"
    assert "submission.json/seed_results/42/val_bpb claims it" in record.seeds[0].why


def test_a_claimed_line_before_the_last_stage_is_taken_and_the_later_one_is_named(tmp_path: Path) -> None:
    log = ttt_log(42, 1.336, sliding=1.08938974)
    record = read_record(
        make_folder(tmp_path / "r", {"train_seed42.log": log}, submission=seed_results({42: 1.08938974}))
    )
    assert picks(record) == {42: 1.08938974}
    assert record.stage == SLIDING
    [conflict] = [found for found in record.conflicts if "last stage" in found.what]
    assert "quantized_ttt 1.33600000" in str(conflict)


def test_a_score_of_an_evaluation_of_its_own_belongs_to_the_training_of_its_seed(tmp_path: Path) -> None:
    files = {
        "train_seed42.log": ttt_log(42, 1.06443847),
        "ttt/seed_42.log": slash_log(seed=42, trains=False, scores=[score_line("quantized_ttt_phased", 1.06400238)]),
    }
    [seed] = read_record(make_folder(tmp_path / "r", files, submission=seed_results({42: 1.06400238}))).seeds
    assert seed.place == f"ttt/seed_42.log:{line_of(files['ttt/seed_42.log'], 'quantized_ttt_phased')}"
    assert (seed.steps, seed.total_bytes) == (5000, CODE + MODEL)


def test_of_two_runs_of_a_seed_the_claim_says_which(tmp_path: Path) -> None:
    files = {
        "train_seed42_original.log": ttt_log(42, 1.06128183),
        "train_seed42_rerun.log": ttt_log(42, 1.06083288, settings={"gptq_reserve_seconds": 8.0}),
    }
    record = read_record(make_folder(tmp_path / "r", files, submission=seed_results({42: 1.06128183})))
    assert record.seeds[0].place.startswith("train_seed42_original.log")
    assert [log.file for log in record.others] == ["train_seed42_rerun.log"]


def test_a_claim_that_no_log_has_is_refused_with_what_the_logs_say(tmp_path: Path) -> None:
    files = {"train_seed42.log": ttt_log(42, 1.10)}
    [seed] = read_record(make_folder(tmp_path / "r", files, submission=seed_results({42: 1.08}))).seeds
    assert seed.score is None
    assert "claims 1.08000000, which no log of the seed says" in seed.why
    assert "quantized_ttt 1.10000000" in seed.why


def test_a_slip_of_the_pen_is_taken_and_told(tmp_path: Path) -> None:
    files = {"train_seed42.log": ttt_log(42, 1.08014)}
    record = read_record(make_folder(tmp_path / "r", files, submission=seed_results({42: 1.08010})))
    assert picks(record) == {42: 1.08014}
    assert "the score was written down otherwise than it was logged" in whats(record)


def test_a_seed_without_a_log_is_refused(tmp_path: Path) -> None:
    files = {"train_seed42.log": ttt_log(42, 1.08)}
    record = read_record(make_folder(tmp_path / "r", files, submission=seed_results({42: 1.08, 7: 1.09})))
    assert picks(record) == {42: 1.08, 7: None}
    assert record.seeds[1].why.endswith("no log of seed 7 is in the folder")


def test_a_log_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    files = {"train_seed42.log": slash_log(seed=42)}
    [seed] = read_record(make_folder(tmp_path / "r", files, submission=seed_results({42: 1.08}))).seeds
    assert seed.score is None
    assert "ends without a line of a final score" in seed.why


def test_an_unknown_label_is_named_in_the_refusal(tmp_path: Path) -> None:
    files = {"train_seed42.log": slash_log(seed=42, scores=[score_line("magic_eval", 1.08)])}
    [seed] = read_record(make_folder(tmp_path / "r", files, submission=seed_results({42: 1.08}))).seeds
    assert seed.score is None
    assert "'magic_eval'" in seed.why


def test_a_seed_that_file_log_and_record_name_differently_is_a_conflict_and_keeps_its_score(tmp_path: Path) -> None:
    files = {"train_seed0.log": ttt_log(1337, 1.0680582)}
    record = read_record(make_folder(tmp_path / "r", files, submission=seed_results({0: 1.0680582})))
    assert picks(record) == {0: 1.0680582}
    [conflict] = [found for found in record.conflicts if found.what == "the seed"]
    assert {text for _, text in conflict.said} == {"1337", "0"}


# ── headlines alone ─────────────────────────────────────────────────────────────────────────────────────────────────


def sliding_log(seed: int, bpb: float, **more: object) -> str:
    label = "final_int6_sliding_window_exact"
    lines = [
        score_line("final_int6_roundtrip_exact", bpb + 0.02, ratio=SP1024, seconds=None),
        score_line(label, bpb, ratio=SP1024),
    ]
    return colon_log(seed=seed, scores=lines, form="int6+zstd", **more)  # type: ignore[arg-type]


def test_a_headline_may_be_the_mean_of_the_logs(tmp_path: Path) -> None:
    files = {f"train_seed{seed}.log": sliding_log(seed, bpb) for seed, bpb in ((1, 1.12), (2, 1.13), (3, 1.125))}
    record = read_record(make_folder(tmp_path / "r", files, submission='{"val_bpb": 1.125}'))
    assert picks(record) == {1: 1.12, 2: 1.13, 3: 1.125}
    assert "claims their mean" in record.seeds[0].why


def test_a_headline_that_is_one_seeds_score_is_told(tmp_path: Path) -> None:
    files = {"train.log": sliding_log(1337, 1.12), "train_seed1338.log": sliding_log(1338, 1.13)}
    record = read_record(make_folder(tmp_path / "r", files, submission='{"val_bpb": 1.12000000}'))
    assert picks(record) == {1337: 1.12, 1338: 1.13}
    assert "the headline is the score of seed 1337 alone, not the mean" in whats(record)


def test_a_headline_of_an_earlier_stage_is_taken_for_every_seed(tmp_path: Path) -> None:
    files = {f"train_seed{seed}.log": sliding_log(seed, bpb) for seed, bpb in ((1, 1.12), (2, 1.13))}
    record = read_record(make_folder(tmp_path / "r", files, submission='{"val_bpb": 1.14500}'))
    assert picks(record) == {1: pytest.approx(1.14), 2: pytest.approx(1.15)}
    assert record.stage == ROUNDTRIP
    assert "the submitted score is not the last stage of the logs" in whats(record)


def test_the_last_run_of_a_file_is_the_submission(tmp_path: Path) -> None:
    text = sliding_log(1337, 1.17, steps=8000) + sliding_log(1337, 1.163, steps=9000)
    record = read_record(make_folder(tmp_path / "r", {"train.log": text}, submission='{"val_bpb": 1.163}'))
    assert picks(record) == {1337: 1.163}
    assert len(record.others) == 1
    assert "has 2 runs" in record.notes[0]


def test_a_headline_of_another_configuration_is_refused_for_every_seed_that_is_named(tmp_path: Path) -> None:
    submission = '{"val_bpb": 1.15015359, "seeds": [1337, 42]}'
    record = read_record(
        make_folder(tmp_path / "r", {"train.log": sliding_log(1337, 1.16660881)}, submission=submission)
    )
    assert picks(record) == {1337: None, 42: None}
    assert "neither a log's score nor their mean" in record.seeds[0].why


def test_logs_of_another_configuration_are_other_runs(tmp_path: Path) -> None:
    files = {"train_seed1.log": sliding_log(1, 1.12), "ablation_seed1.log": sliding_log(1, 1.2, parameters=9_000_000)}
    record = read_record(make_folder(tmp_path / "r", files, submission='{"val_bpb": 1.12}'))
    assert picks(record) == {1: 1.12}
    assert [log.file for log in record.others] == ["ablation_seed1.log"]


def test_an_ablation_beside_the_record_is_no_seed_of_it(tmp_path: Path) -> None:
    ablation = sliding_log(1, 1.2).replace("matrix_lr:0.04", "matrix_lr:0.02")
    files = {
        "train_seed1.log": sliding_log(1, 1.12),
        "train_seed2.log": sliding_log(2, 1.122),
        "lr_seed1.log": ablation,
    }
    record = read_record(make_folder(tmp_path / "r", files, submission='{"val_bpb": 1.12000}'))
    assert picks(record) == {1: 1.12, 2: 1.122}
    assert [log.file for log in record.others] == ["lr_seed1.log"]


def test_a_longer_run_is_no_seed_of_a_shorter_one(tmp_path: Path) -> None:
    longer = sliding_log(1, 1.05).replace("max_wallclock_seconds:600.000", "max_wallclock_seconds:14400.000")
    files = {"train_4h.log": longer, "train_10min.log": sliding_log(1, 1.12)}
    record = read_record(make_folder(tmp_path / "r", files, submission='{"val_bpb": 1.05}'))
    assert picks(record) == {1: 1.05}


def test_seeds_whose_logs_also_print_their_machine_are_one_configuration_where_the_mean_says_so(tmp_path: Path) -> None:
    files = {
        f"train_seed{seed}.log": sliding_log(seed, bpb).replace(
            "tie_embeddings:True", f"tie_embeddings:True started:{seed}s"
        )
        for seed, bpb in ((1, 1.12), (2, 1.13))
    }
    record = read_record(make_folder(tmp_path / "r", files, submission='{"val_bpb": 1.125}'))
    assert picks(record) == {1: 1.12, 2: 1.13}


def test_nothing_is_guessed_where_nothing_is_claimed_and_logs_differ(tmp_path: Path) -> None:
    files = {"a_seed1.log": sliding_log(1, 1.12), "b_seed1.log": sliding_log(1, 1.2, parameters=9_000_000)}
    [seed] = read_record(make_folder(tmp_path / "r", files)).seeds
    assert seed.score is None
    assert "the logs are of 2 configurations" in seed.why


def test_one_log_without_a_submission_file_has_its_last_stage(tmp_path: Path) -> None:
    record = read_record(make_folder(tmp_path / "r", {"train.log": sliding_log(1337, 1.16)}))
    assert picks(record) == {1337: 1.16}
    assert "nothing claims a score" in record.seeds[0].why
    assert "there is no submission*.json" in record.notes


def test_bits_per_byte_under_the_key_of_the_loss_are_found_and_told(tmp_path: Path) -> None:
    record = read_record(
        make_folder(tmp_path / "r", {"train.log": sliding_log(1, 1.14276)}, submission='{"val_loss": 1.14276}')
    )
    assert picks(record) == {1: 1.14276}
    assert any("stands under another" in what for what in whats(record))


def test_a_seed_that_ends_early_beside_finished_ones_stays_visible(tmp_path: Path) -> None:
    files = {"train_seed1.log": sliding_log(1, 1.12), "train_seed2.log": colon_log(seed=2)}
    record = read_record(make_folder(tmp_path / "r", files, submission='{"val_bpb": 1.12}'))
    assert picks(record) == {1: 1.12, 2: None}


def test_the_short_familys_score_is_its_sliding_line(tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path / "r", {"ternary_log_42.txt": short_log(bpb=1.1565)}, submission='{"val_bpb": 1.1565}',
        name="submission_ternary.json",
    )  # fmt: skip
    assert picks(read_record(folder)) == {42: 1.1565}


# ── what disagrees ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_copies_of_a_log_count_once(tmp_path: Path) -> None:
    text = sliding_log(42, 1.12)
    record = read_record(
        make_folder(tmp_path / "r", {"train.log": text, "train_seed42.log": text}, submission='{"val_bpb": 1.12}')
    )
    assert picks(record) == {42: 1.12}
    assert record.seeds[0].place.startswith("train_seed42.log")
    assert "train.log has the same run as train_seed42.log" in record.notes


def test_sizes_steps_and_times_are_compared_with_the_logs(tmp_path: Path) -> None:
    results = {"42": {"val_bpb": 1.08, "artifact_bytes": 15_800_001, "steps": 4999, "train_time_s": 590.02}}
    folder = make_folder(
        tmp_path / "r", {"train_seed42.log": ttt_log(42, 1.08)},
        submission={"val_bpb": 1.08, "bytes_total": 15_800_001, "seed_results": results},
    )  # fmt: skip
    found = whats(read_record(folder))
    assert {"bytes of seed 42", "steps of seed 42", "the size is not that of the largest artifact"} <= set(found)
    assert "train seconds of seed 42" not in found


def test_conflicts_name_the_line_of_the_submission_file(tmp_path: Path) -> None:
    submission = '{\n "val_bpb": 1.08,\n "bytes_total": 1\n}\n'
    record = read_record(make_folder(tmp_path / "r", {"train_seed42.log": ttt_log(42, 1.08)}, submission=submission))
    [conflict] = [found for found in record.conflicts if "size" in found.what]
    assert conflict.said[0][0] == "submission.json:3"


def test_seeds_of_different_settings_or_code_are_a_conflict(tmp_path: Path) -> None:
    files = {
        "train_seed1.log": ttt_log(1, 1.08, settings={"qk_gain": 5.0}),
        "train_seed2.log": ttt_log(2, 1.081, settings={"qk_gain": 5.25}, code=CODE + 36),
    }  # fmt: skip
    found = whats(read_record(make_folder(tmp_path / "r", files, submission=seed_results({1: 1.08, 2: 1.081}))))
    assert {"seeds differ in qk_gain", "seeds differ in code_bytes"} <= set(found)


def test_several_logs_of_one_printed_seed_are_a_conflict(tmp_path: Path) -> None:
    files = {f"train_v{number}.txt": sliding_log(1337, 1.19 + number / 1000) for number in range(2)}
    record = read_record(make_folder(tmp_path / "r", files, submission='{"val_bpb": 1.1905}'))
    assert len(record.scores) == 2
    assert "several logs print one seed" in whats(record)


def test_a_row_of_the_readme_that_no_line_has_is_a_conflict(tmp_path: Path) -> None:
    readme = "| Seed | TTT |\n|---|---|\n| 42 | 1.0700 |\n| 43 | 1.0810 |\n\nmean 1.0805\n"
    files = {"train_seed42.log": ttt_log(42, 1.08), "train_seed43.log": ttt_log(43, 1.081)}
    record = read_record(
        make_folder(tmp_path / "r", files, submission=seed_results({42: 1.08, 43: 1.081}), readme=readme)
    )
    assert [what for what in whats(record) if "README" in what] == ["the README's row of seed 42"]


def test_scores_that_are_told_of_without_a_log_are_kept_apart(tmp_path: Path) -> None:
    submission = seed_results({314: 1.08}, disclosure={"all_val_bpb": {"314": 1.08, "7": 1.0854, "9999": 1.0853}})
    record = read_record(make_folder(tmp_path / "r", {"train_seed314.log": ttt_log(314, 1.08)}, submission=submission))
    assert [seed for seed, _ in record.disclosed] == [7, 9999]
    assert scored_arm(record).started == 3


def test_what_breaks_a_limit_or_has_an_unknown_byte_count_is_a_doubt(tmp_path: Path) -> None:
    log = colon_log(
        seed=1, scores=[score_line("final_int6_roundtrip_exact", 1.2, ratio=0.3)], model=16_000_000, seconds=610.0
    )
    record = read_record(make_folder(tmp_path / "r", {"train.log": log}, submission='{"val_bpb": 1.2}'))
    told = " ".join(map(str, record.doubts))
    assert "over the cap" in told
    assert "longer than the limit" in told
    assert "0.3000000 tokens per byte" in told
    assert picks(record) == {1: 1.2}


def test_code_and_model_that_are_not_the_total_are_a_conflict(tmp_path: Path) -> None:
    log = sliding_log(1, 1.2).replace(f"int6+zstd: {CODE + MODEL} bytes", f"int6+zstd: {CODE + MODEL + 5} bytes")
    record = read_record(make_folder(tmp_path / "r", {"train.log": log}, submission='{"val_bpb": 1.2}'))
    assert "code and model bytes are not the total" in whats(record)


def test_a_damaged_submission_file_is_a_note_and_the_logs_stand(tmp_path: Path) -> None:
    record = read_record(make_folder(tmp_path / "r", {"train.log": sliding_log(1, 1.2)}, submission="{"))
    assert picks(record) == {1: 1.2}
    assert "not a JSON object" in record.notes[0]


# ── as others see it ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_comparison_gets_scores_with_file_and_line(tmp_path: Path) -> None:
    arm = scored_arm(read_record(sound(tmp_path / "r", {42: 1.08, 7: 1.09})), prefix="imports/r/files/")
    assert arm.by_seed == {42: 1.08, 7: 1.09}
    assert arm.scores[0].source == "imports/r/files/train_seed42.log"
    assert arm.scores[0].line == line_of(ttt_log(42, 1.08), "quantized_ttt")
    assert arm.scores[0].artifact_bytes == CODE + MODEL
    assert not arm.is_ours


def test_a_tree_is_divided_into_records(tmp_path: Path) -> None:
    for name in ("track_a/one", "track_a/two", "track_b/three"):
        sound(tmp_path / name, {42: 1.08})
    assert [path.name for path in find_records(tmp_path)] == ["one", "two", "three"]
    assert [path.name for path in find_records(tmp_path / "track_a" / "one")] == ["one"]


def test_a_tree_without_records_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(ConfigError, match="no record is in it"):
        find_records(tmp_path)
    with pytest.raises(ConfigError, match="there is no such folder"):
        find_records(tmp_path / "nowhere")


def test_integers_and_texts_in_a_submission_file_do_no_harm(tmp_path: Path) -> None:
    submission = json.dumps({"val_bpb": 1.2, "seeds": ["a"], "author": 7, "seed_results": {"x": 1, "1": [2]}})
    assert picks(
        read_record(make_folder(tmp_path / "r", {"train.log": sliding_log(1, 1.2)}, submission=submission))
    ) == {1: 1.2}
