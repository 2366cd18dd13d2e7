import dataclasses
import errno

import pytest
from fakes import FAKE_BUNDLE
from make_controller import controller
from make_verified import data_of, make_run

from orchestrator import attempt_commands, cli, preflight, repeat, source_run, worker
from orchestrator.errors import ConfigError
from orchestrator.evidence import gather
from orchestrator.family import family_of
from orchestrator.home import Home
from orchestrator.ledger import Ledger
from orchestrator.record_attempt import record_study
from orchestrator.runs import RunRequest, RunStore
from orchestrator.source_run import Sources
from orchestrator.study_file import parse_study
from trainer import protocol
from trainer.config import from_mapping, knob_value, with_knobs
from trainer.protocol import ARTIFACT, WEIGHTS, read_spec, sha256_of

KNOBS = {"ttt.lr": 0.01, "optim.matrix_lr": 0.03}


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, knobs=KNOBS)


def test_a_run_is_found_by_the_beginning_of_its_id_with_what_its_preset_has_otherwise(home, run):
    source = source_run.find(home, run.run_id[:6])
    assert source.artifact_sha256 == sha256_of(run.artifact)
    assert source_run.knobs_set(source) == {**KNOBS, "limits.artifact_bytes": 20_000}


def test_a_run_without_a_model_file_of_its_own_is_refused(home, run):
    run.artifact.write_bytes(b"another")
    with pytest.raises(
        ConfigError, match="has no model file that could be scored again: .* is not the one of its result"
    ):
        source_run.find(home, run.run_id)
    run.artifact.unlink()
    with pytest.raises(
        ConfigError, match=r"\(complete\) has no model file that could be scored again: .* is missing"
    ) as caught:
        source_run.find(home, run.run_id)
    assert "wait for its end" in caught.value.hint


def test_a_run_of_another_home_is_refused(tmp_path, run):
    other = Home(tmp_path / "other")
    with pytest.raises(ConfigError, match="the run must lie in"):
        source_run.find(other, str(run.root))


@pytest.mark.parametrize(
    "knob", ["ttt.epochs", "ttt.lora_rank", "evaluation.stride", "quant.mlp_bits", "limits.artifact_bytes"]
)
def test_knobs_of_scoring_may_differ(home, run, knob):
    source = source_run.find(home, run.run_id)
    config = with_knobs(source.config, {knob: 2})
    source_run.require_scorable(source, config, source.spec.manifest_sha256)


def test_that_a_trial_could_have_been_resumed_is_no_difference_of_what_is_scored(home, run):
    source = source_run.find(home, run.run_id)
    resumable = with_knobs(source.config, {"runtime.resumable": True})
    source_run.require_scorable(source, resumable, source.spec.manifest_sha256)
    assert source_run.knobs_set(dataclasses.replace(source, config=resumable)) == source_run.knobs_set(source)


def test_any_other_knob_and_other_data_are_refused_with_both_values(home, run):
    source = source_run.find(home, run.run_id)
    config = with_knobs(source.config, {"optim.matrix_lr": 0.05, "data.order_seed": 5, "ttt.lr": 0.5})
    with pytest.raises(ConfigError) as caught:
        source_run.require_scorable(source, config, source.spec.manifest_sha256)
    changes = str(caught.value).rpartition(";")[2]
    assert set(changes.strip().split(", there")) & {"optim.matrix_lr is 0.05", "data.order_seed is 5"}
    assert "data.order_seed is 5, there -1" in changes and "optim.matrix_lr is 0.05, there 0.03" in changes
    assert "ttt.lr" not in str(caught.value).partition(";")[2]
    with pytest.raises(ConfigError, match="was made with another data set"):
        source_run.require_scorable(source, source.config, "0" * 64)


def request_of(found, config=None, **changes):
    taken = Sources((found,)).taken(config or found.config, found.spec.seed)
    return RunRequest(**{
        "preset": "smoke", "config": config or found.config, "seed": found.spec.seed, "data_dir": found.spec.data_dir,
        "manifest_sha256": found.spec.manifest_sha256, **taken, **changes,
    })  # fmt: skip


def test_a_run_that_scores_another_holds_its_model_file_and_is_a_run_of_its_own(home, run):
    source, store = source_run.find(home, run.run_id), RunStore(home)
    planned = store.plan(request_of(source), bundle=FAKE_BUNDLE, code={})
    assert sha256_of(planned.source) == source.artifact_sha256
    spec = read_spec(planned.spec)
    assert (spec.source, spec.source_sha256) == (run.run_id, source.artifact_sha256)
    ids = {
        store.plan(request, bundle=FAKE_BUNDLE, code={}).run_id
        for request in (request_of(source), request_of(source, source="", source_sha256=""), request_of(source, seed=8))
    }
    assert len(ids) == 3


def test_a_job_whose_source_was_changed_is_not_started(home, run):
    planned = RunStore(home).plan(request_of(source_run.find(home, run.run_id)), bundle=FAKE_BUNDLE, code={})
    planned.source.write_bytes(b"another")
    attempt = planned.attempt(1)
    worker.run_attempt(str(planned.root), 1, 1, "", 5.0)
    result = protocol.read_result(attempt.result)
    assert result.status == protocol.FAILED
    assert f"{planned.source}: its SHA-256 is" in result.failure.message


def with_weights(run, content=b"float weights"):
    """The same run with the weights that its training left."""
    run.weights.parent.mkdir()
    run.weights.write_bytes(content)
    return run


def test_a_knob_of_the_quantiser_takes_the_weights_and_any_other_the_model_file(home, run):
    source = source_run.find(home, with_weights(run).run_id)
    parts = {
        knob: source.part_for(with_knobs(source.config, {knob: value}))
        for knob, value in {
            "ttt.lr": 0.5, "evaluation.stride": 32, "quant.mlp_bits": 5, "quant.method": "rtn",
            "limits.artifact_bytes": 30_000, "ttt.before_quantization": True,
        }.items()
    }  # fmt: skip
    assert parts == {
        "ttt.lr": ARTIFACT, "evaluation.stride": ARTIFACT, "quant.mlp_bits": WEIGHTS, "quant.method": WEIGHTS,
        "limits.artifact_bytes": WEIGHTS, "ttt.before_quantization": WEIGHTS,
    }  # fmt: skip
    coarser = with_knobs(source.config, {"quant.mlp_bits": 5})
    planned = RunStore(home).plan(request_of(source, coarser), bundle=FAKE_BUNDLE, code={})
    spec = read_spec(planned.spec)
    assert (spec.source_part, spec.source_sha256) == (WEIGHTS, sha256_of(run.weights))
    assert planned.source.samefile(run.weights)  # a second name, no second copy


def test_a_source_is_copied_where_the_file_system_has_no_second_name_for_it(home, run, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    planned = RunStore(home).plan(request_of(source_run.find(home, run.run_id)), bundle=FAKE_BUNDLE, code={})
    assert planned.source.read_bytes() == run.artifact.read_bytes()
    assert not planned.source.samefile(run.artifact)


def test_what_a_killed_controller_left_of_a_plan_is_planned_again(home, run):
    request = request_of(source_run.find(home, run.run_id))
    planned = RunStore(home).plan(request, bundle=FAKE_BUNDLE, code={})
    planned.spec.unlink()
    assert RunStore(home).plan(request, bundle=FAKE_BUNDLE, code={}).spec.exists()
    assert sha256_of(planned.source) == read_spec(planned.spec).source_sha256


def test_a_run_without_weights_cannot_be_quantised_anew_and_its_own_source_is_named(home, run):
    source = source_run.find(home, run.run_id)
    coarser = with_knobs(source.config, {"quant.mlp_bits": 5})
    with pytest.raises(ConfigError, match="has no trained weights that could be quantised anew: .* is missing"):
        Sources((source,)).taken(coarser, 7)
    source = dataclasses.replace(source, spec=dataclasses.replace(source.spec, source="aa11"))
    with pytest.raises(ConfigError) as caught:
        Sources((source,)).taken(coarser, 7)
    assert caught.value.hint == "it took them from run aa11: name that one"


def test_a_model_that_learned_beforehand_is_no_source(home, run):
    source = source_run.find(home, run.run_id)
    spoilt = dataclasses.replace(source, config=with_knobs(source.config, {"ttt.before_quantization": True}))
    with pytest.raises(ConfigError, match="learned the validation split before it was quantised"):
        source_run.require_scorable(spoilt, source.config, source.spec.manifest_sha256)


# ── several runs, one a seed ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def three(run):
    """Runs of seeds 7, 8 and 9."""
    return [run, *(sibling(run, seed) for seed in (8, 9))]


def sibling(run, seed):
    """A complete run of the same configuration with another seed, and a model file of its own."""
    store, spec = RunStore(Home(run.root.parents[1])), read_spec(run.spec)
    request = RunRequest(
        preset=spec.preset, config=from_mapping(spec.config), seed=seed, data_dir=spec.data_dir,
        manifest_sha256=spec.manifest_sha256,
    )  # fmt: skip
    other = store.plan(request, bundle=run.bundle.read_bytes(), code={})
    other.artifact.write_bytes(run.artifact.read_bytes() + bytes([seed]))
    result = protocol.read_result(run.attempt(1).result)
    changes = {"run_id": other.run_id, "seed": seed, "artifact_sha256": sha256_of(other.artifact)}
    protocol.write_result(other.attempt(1).result, dataclasses.replace(result, **changes))
    return other


def listed(runs):
    return ", ".join(f'"{run.run_id}"' for run in runs)


def test_a_study_of_several_runs_has_their_seeds_and_each_seed_its_own_run(home, run, three):
    text = study_text(run, extra="[confirm]").replace(f'"{run.run_id}"', f"[{listed(three)}]")
    study = source_run.bound(home, parse_study(text))
    assert (study.search.seeds, study.confirm.seeds) == ((7, 8, 9), (7, 8, 9))
    sources = source_run.sources_of(home, study)
    taken = {seed: sources.taken(study.config, seed) for seed in study.search.seeds}
    assert {seed: found["source"] for seed, found in taken.items()} == dict(
        zip((7, 8, 9), (found.run_id for found in three), strict=True)
    )
    assert len({found["source_sha256"] for found in taken.values()}) == 3


def test_seeds_that_are_named_must_be_those_of_the_runs(home, run, three):
    text = study_text(run, extra="seeds = [7, 5]").replace(f'"{run.run_id}"', f"[{listed(three)}]")
    with pytest.raises(
        ConfigError, match=r"seeds \[5\] are of none of the runs in `from`, whose seeds are \[7, 8, 9\]"
    ):
        source_run.bound(home, parse_study(text))
    fewer = parse_study(text.replace("[7, 5]", "[7, 9]"))
    assert source_run.bound(home, fewer).search.seeds == (7, 9)


def test_two_runs_of_one_seed_are_refused(home, run):
    again = sibling(run, 7)  # the very run
    with pytest.raises(ConfigError, match="are both of seed 7"):
        source_run.find_all(home, [run.run_id, again.run_id])


def test_a_study_stands_for_the_runs_of_its_arm(home, run, three):
    ledger = Ledger(home.study("base").ledger)
    ledger.append(
        "arm_asked",
        arm="preset",
        trial=0,
        params={},
        runs={found: r.run_id for found, r in zip((7, 8, 9), three, strict=True)},
    )
    assert source_run.find_all(home, ["base"]).seeds == (7, 8, 9)
    assert source_run.find_all(home, ["base:preset"]).seeds == (7, 8, 9)
    with pytest.raises(ConfigError, match="from: study 'base' has no arm 'best'") as caught:
        source_run.find_all(home, ["base:best"])
    assert "preset" in caught.value.hint


def test_a_source_that_is_neither_run_nor_study_is_answered_with_both(home, run):
    Ledger(home.study("begun").ledger).append("opened", source="", digest="", caddie="0")
    with pytest.raises(ConfigError, match="from: there is no run 'bse' .*, nor a study of that name") as caught:
        source_run.find_all(home, ["bse"])
    assert "studies: begun" in caught.value.hint and run.run_id in caught.value.hint
    with pytest.raises(ConfigError, match="study 'begun' has confirmed nothing yet"):
        source_run.find_all(home, ["begun"])


def test_runs_of_one_configuration_are_one_family_whichever_model_each_takes(home, run, three):
    specs = []
    for found in three:
        source = source_run.find(home, found.run_id)
        specs.append(read_spec(RunStore(home).plan(request_of(source), bundle=FAKE_BUNDLE, code={}).spec))
    assert len({family_of(spec) for spec in specs}) == 1
    assert family_of(specs[0]) != family_of(read_spec(run.spec))  # which was trained


def study_text(run, *, space="ttt.lr", objective="ttt", extra=""):
    return f"""
name = "sweep"
question = "Which rate?"
preset = "smoke"
data = "made-up"
from = "{run.run_id}"

[set]
"optim.matrix_lr" = 0.03
"limits.artifact_bytes" = 20_000

[space."{space}"]
low = 0.001
high = 0.1

[search]
trials = 2
objective = "{objective}"
{extra}
"""


def test_a_study_can_search_over_the_scoring_of_one_run(run):
    study = parse_study(study_text(run))
    assert study.from_runs == (run.run_id,)
    source = source_run.find(Home(run.root.parents[1]), *study.from_runs)
    source_run.require_scorable(source, study.config, source.spec.manifest_sha256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": "optim.scalar_lr"}, r"\[space\] optim.scalar_lr cannot matter where a stored model is only scored"),
        ({"objective": "post_ema"}, r"\[search\] objective must be one of the stored model's, got 'post_ema'"),
        ({"extra": "[stop_early]\nat_fracs = [0.5]"}, r"\[stop_early\] needs training"),
    ],
)
def test_a_study_of_one_run_cannot_ask_for_training(run, changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_study(study_text(run, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7", "from must be the id of a run or the name of a study in quotes, or a list of these, got 7"),
        ('["a", 7]', r"or a list of these, got \['a', 7\]"),
        ('["a", "a"]', "from names a run twice"),
    ],
)
def test_a_study_s_sources_are_texts_and_each_named_once(run, text, message):
    with pytest.raises(ConfigError, match=message):
        parse_study(study_text(run).replace(f'"{run.run_id}"', text))


def test_the_check_before_a_study_compares_it_with_its_source(home, run, monkeypatch):
    monkeypatch.setattr(preflight.datasets, "require_sound", lambda _: None)  # the data are made up
    assert preflight.check(parse_study(study_text(run)), home).root == data_of(run).root
    other = study_text(run).replace("0.03", "0.02")
    with pytest.raises(ConfigError, match=r"only ttt.\*, .* may differ; optim.matrix_lr is 0.02, there 0.03"):
        preflight.check(parse_study(other), home)


def test_a_record_from_a_run_has_a_name_of_its_own_and_keeps_its_source():
    ask = {"data": "d", "seeds": (7,), "knobs": {"ttt.lr": 0.005}}
    plain, scored, other = (record_study("smoke", **ask, from_runs=runs) for runs in ((), ("abc",), ("abd", "abe")))
    assert (plain.from_runs, scored.from_runs, other.from_runs) == ((), ("abc",), ("abd", "abe"))
    assert len({plain.name, scored.name, other.name}) == 3
    assert scored.question == "What does run abc score on seeds 7?"


def command_line(home, *arguments):
    return cli.make_parser().parse_args(["--home", str(home.root), "run", *arguments])


def test_the_command_takes_data_seed_preset_and_knobs_from_the_run(home, run):
    arguments = command_line(home, "--from", run.run_id[:8], "--set", "ttt.lr=0.5", "--set", "ttt.method=lora")
    study = attempt_commands.study_from_run(arguments, home)
    assert (study.preset, study.from_runs, study.confirm.seeds) == ("smoke", (run.run_id,), (7,))
    assert study.data == str(data_of(run).root)
    assert knob_value(study.config, "optim.matrix_lr") == 0.03
    assert (knob_value(study.config, "ttt.lr"), knob_value(study.config, "ttt.method")) == (0.5, "lora")
    assert attempt_commands.study_from_run(
        command_line(home, "--from", run.run_id, "--seeds", "1,2"), home
    ).confirm.seeds == (1, 2)


def test_a_preset_and_a_run_exclude_one_another_and_one_is_needed(home, run, capsys):
    for arguments, message in (
        (["smoke", "--from", run.run_id], "a preset and --from exclude one another, got 'smoke'"),
        ([], "a preset or --from RUN must be given"),
    ):
        assert cli.main(["--home", str(home.root), "run", *arguments]) == ConfigError.exit_code
        assert message in capsys.readouterr().err


def test_a_knob_of_training_is_refused_before_anything_is_planned(home, run, capsys, monkeypatch):
    monkeypatch.setattr(preflight.datasets, "require_sound", lambda _: None)
    before = RunStore(home).ids()
    code = cli.main(["--home", str(home.root), "run", "--from", run.run_id, "--set", "optim.matrix_lr=0.5"])
    assert code == ConfigError.exit_code
    assert "limits.artifact_bytes may differ; optim.matrix_lr is 0.5, there 0.03" in capsys.readouterr().err
    assert RunStore(home).ids() == before


def test_a_study_runs_on_the_model_of_each_seed_and_says_how_to_repeat_it(home, run, three):
    text = f"""
        name = "again"
        question = "What do they score with another rate?"
        preset = "smoke"
        data = "made-up"
        from = [{listed(three)}]
        [set]
        "optim.matrix_lr" = 0.03
        "limits.artifact_bytes" = 20_000
        "ttt.lr" = 0.5
        [confirm]
        [resources]
        preflight = false
    """
    study = source_run.bound(home, parse_study(text))
    parts = {"sources": source_run.sources_of(home, study), "manifest_sha256": read_spec(run.spec).manifest_sha256}
    controller(study, home, **parts).run()
    evidence = gather(home, "again")
    specs = {found.seed: read_spec(home.run(found.run_id).spec) for found in evidence.arms[0].runs}
    assert {seed: spec.source for seed, spec in specs.items()} == dict(
        zip((7, 8, 9), (found.run_id for found in three), strict=True)
    )
    assert evidence.study.confirm.seeds == (7, 8, 9)  # read back from the ledger, without its sources
    commands = [words for _, words in repeat.listing(home, evidence).parts]
    assert any(f"--from {','.join(found.run_id for found in three)} --seeds 7,8,9" in words for words in commands)


CELLS = """
    name = "cells"
    question = "Do rate and decay act on one another?"
    preset = "smoke"
    data = "made-up"
    from = [{runs}]
    [set]
    "optim.matrix_lr" = 0.03
    "limits.artifact_bytes" = 20_000
    [factors.rate.low]
    "ttt.lr" = 0.1
    [factors.rate.high]
    "ttt.lr" = 0.5
    [resources]
    preflight = false
"""


def run_cells(home, runs):
    study = source_run.bound(home, parse_study(CELLS.format(runs=listed(runs))))
    parts = {
        "sources": source_run.sources_of(home, study), "manifest_sha256": read_spec(runs[0].spec).manifest_sha256,
    }  # fmt: skip
    controller(study, home, **parts).run()
    return gather(home, "cells")


def test_a_design_goes_on_with_more_checkpoints_and_runs_what_is_new_alone(home, run, three):
    before = run_cells(home, three[:2])
    after = run_cells(home, three)
    assert [len(found.attempts) for found in (before, after)] == [4, 6]
    assert {arm.name: [found.seed for found in arm.runs] for arm in after.arms} == {"low": [7, 8, 9], "high": [7, 8, 9]}


def test_a_design_is_not_continued_without_a_checkpoint_or_with_another_of_its_seed(home, run, three):
    run_cells(home, three)
    with pytest.raises(ConfigError, match="the source of seed 9 changed since the study was opened"):
        run_cells(home, three[:2])
    other = sibling(run, 8)
    other.artifact.write_bytes(b"another model")
    result = protocol.read_result(other.attempt(1).result)
    protocol.write_result(
        other.attempt(1).result, dataclasses.replace(result, artifact_sha256=sha256_of(other.artifact))
    )
    with pytest.raises(ConfigError, match="the source of seed 8 changed"):
        run_cells(home, three)
