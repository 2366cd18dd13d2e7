import dataclasses
import re
from pathlib import Path

import pytest
from fakes import study_text, tiny_study

from orchestrator.errors import ConfigError
from orchestrator.home import SHIPPED_STUDIES
from orchestrator.presets import load_preset
from orchestrator.record_attempt import record_study
from orchestrator.study import SLURM_MARGIN_MINUTES, StopEarlyPlan
from orchestrator.study_file import load_study, parse_study
from trainer.config import Config, knob_value
from trainer.protocol import SLIDING, TTT


@pytest.mark.parametrize("path", sorted(SHIPPED_STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_study_is_valid_and_named_after_its_file(path):
    assert load_study(path).name == path.stem


@pytest.mark.parametrize("path", sorted((SHIPPED_STUDIES / "presets").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_preset_is_valid(path):
    assert isinstance(load_preset(path.stem), Config)


def test_a_study_sets_knobs_on_its_preset_and_the_preset_is_a_point_of_its_space():
    study = tiny_study(settings='"ttt.lr" = 0.004\n"optim.muon_weight_decay" = 0.09')
    assert study.preset_params() == {"optim.muon_weight_decay": 0.09, "ttt.lr": 0.004}
    assert study.config_of({"ttt.lr": 0.01}).ttt.lr == 0.01
    assert study.config.ttt.lr == 0.004


def test_a_number_may_be_written_as_a_whole_one():
    assert tiny_study(resources="timeout_minutes = 2").resources.timeout_minutes == 2.0


def test_a_shipped_study_is_found_by_its_name():
    from pathlib import Path

    assert load_study(Path("wd-qk-ttt-smoke")).name == "wd-qk-ttt-smoke"


def test_steps_of_comparison_rise_and_are_rounded_up():
    assert StopEarlyPlan(at_fracs=(0.5, 0.25, 0.2501)).per_milles == (250, 500)


CASES = [
    ('name = "tiny"', 'name = = "tiny"', "not TOML"),
    ('name = "tiny"', 'nam = "tiny"', "a study has no key 'nam'"),
    ('name = "tiny"', "", 'a study needs name = "..."'),
    ('name = "tiny"', "name = 3", 'a study needs name = "...", got 3'),
    ('name = "tiny"', 'name = "Tiny study"', "name must be lower-case"),
    ('preset = "smoke"', 'preset = "smok"', "there is no preset 'smok'"),
    ("[search]\ntrials = 4\nseeds = [1]", "", "a study needs a table [search] with entries"),
    ("trials = 4", "trial = 4", "[search] has no key 'trial'"),
    ("trials = 4", "", "[search] needs trials"),
    ("trials = 4", "trials = 0", "[search] trials must be at least 1, got 0"),
    ("trials = 4", "trials = 4.5", "[search] trials must be of type int, got 4.5"),
    ("trials = 4", "trials = 4\nstartup_trials = 0", "[search] startup_trials must be at least 1, got 0"),
    ("seeds = [1]", "seeds = []", "[search] seeds must be a list with at least one value"),
    ("seeds = [1]", "seeds = [1, 1]", "[search] seeds names a value twice"),
    ("seeds = [1]", "seeds = [-1]", "[search] seeds must lie between 0 and 9223372036854775807, got -1"),
    ("seeds = [1]", "seeds = [9223372036854775808]", "[search] seeds must lie between 0 and"),
    ("seeds = [42, 314]", "seeds = [42, -7]", "[confirm] seeds must lie between 0 and"),
    ("slots = 2", "timeout_minutes = inf", "[resources] timeout_minutes must be finite, got inf"),
    ("seeds = [1]", 'seeds = ["1"]', "[search] seeds must be of type int, got '1'"),
    ("trials = 4", 'trials = 4\nsampler = "tpee"', "[search] sampler must be one of tpe"),
    ("trials = 4", 'trials = 4\nobjective = "tt"', "[search] objective must be one of"),
    ("slots = 2", "slots = 0", "[resources] slots must be at least 1, got 0"),
    ("slots = 2", "gpus_per_run = -1", "[resources] gpus_per_run must be at least 0, got -1"),
    ("slots = 2", "processes_per_run = 0", "[resources] processes_per_run must be at least 1"),
    ("slots = 2", "max_attempts = 0", "[resources] max_attempts must be at least 1"),
    ("slots = 2", "timeout_minutes = -1", "[resources] timeout_minutes must not be negative"),
    ("slots = 2", 'launcher = "slurn"', "[resources] launcher must be one of local"),
    ("[set]", '[set]\n"ttt.lrr" = 1', "there is no knob 'ttt.lrr'"),
    ("[set]", '[set]\n"ttt.method" = "off"', 'objective is "ttt", but ttt.method is "off"'),
    ("slots = 2", "slots = 2\n[stop_early]\nat_fracs = [1.0]", "at_fracs must lie between 0.001 and 0.999, got 1.0"),
    ("slots = 2", "slots = 2\n[stop_early]\nstartup_trials = 0", "[stop_early] startup_trials must be at least 1"),
    ("[resources]\nslots = 2", "resources = 3", "[resources] must be a table, got 3"),
    ("trials = 4", 'trials = 4\nalso_minimize = ["bytes"]', "[search] also_minimize must be one of artifact_bytes"),
    ("trials = 4", 'trials = 4\nsampler = "cmaes"\nalso_minimize = ["eval_seconds"]', '"cmaes" has one objective'),
    ("trials = 4", 'trials = 4\nsampler = "grid"', 'sampler = "grid" needs a step'),
    (
        "[search]\n",
        '[space."quant.coder"]\nchoices = ["entropy", "brotli"]\n[search]\nsampler = "cmaes"\n',
        "choices have no direction",
    ),
    ("slots = 2", 'slots = 2\n[stop_early]\nrule = "median "', "[stop_early] rule must be one of median"),
    ("slots = 2", 'slots = 2\n[stop_early]\nmetric = "loss"', "[stop_early] metric must be one of train_loss"),
    ("slots = 2", 'slots = 2\n[stop_early]\nmetric = "val_loss"', "needs runs that validate while they train"),
    ("slots = 2", "slots = 2\n[stop_early]\nreduction = 1", "[stop_early] reduction must be at least 2, got 1"),
    (
        "slots = 2",
        "slots = 2\n[stop_early]\nmin_throughput = 1.0",
        "[stop_early] min_throughput must lie between 0 and 1",
    ),
    ("seeds = [42, 314]", "seeds = [42, 314]\nfirst = 3", "[confirm] first goes with sequential = true"),
    ("seeds = [42, 314]", "seeds = [42, 314]\nsequential = true\nfirst = 3", "[confirm] first must lie between 2 and"),
    ("seeds = [42, 314]", "seeds = [42, 314]\nsequential = true\nstep = 0", "[confirm] step must be at least 1, got 0"),
    (
        "seeds = [42, 314]",
        "seeds = [42, 314]\nsequential = true\nalpha = 0.5",
        "[confirm] alpha must lie between 0 and 0.5",
    ),
    (
        "seeds = [42, 314]",
        "seeds = [42, 314]\nsequential = true\nmargin = -1.0",
        "[confirm] margin must not be negative",
    ),
    ("slots = 2", "slots = 2\n[constraints]\nartifact = 3", "[constraints] has no key 'artifact'"),
    (
        "slots = 2",
        "slots = 2\n[constraints]\nartifact_bytes = 0",
        "[constraints] artifact_bytes must be a number above 0",
    ),
    ("slots = 2", "slots = 2\n[budget]\ngpu_hours = -1", "[budget] gpu_hours must not be negative, got -1.0"),
    ("slots = 2", "slots = 2\n[budget]\ncost = 5", "[budget] a cap in money needs a price"),
]


@pytest.mark.parametrize(("old", "new", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_a_bad_study_names_the_table_the_value_and_the_rule(old, new, message):
    text = study_text()
    assert old in text
    if old.startswith("[resources]"):
        text = new + text.replace(old, "")
    else:
        text = text.replace(old, new, 1)
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_study(text)


def test_a_bad_study_file_is_named(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("x = 1")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: a study has no key 'x'")):
        load_study(path)


def test_a_study_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: not UTF-8 text: byte 0xff at 0")):
        load_study(path)


def test_a_missing_study_file_is_answered_with_the_nearest_shipped_one(tmp_path):
    with pytest.raises(ConfigError, match="there is no such study file") as caught:
        load_study(tmp_path / "wd-qk-ttt-smok")
    assert "wd-qk-ttt-smoke" in caught.value.hint


@pytest.mark.parametrize(
    "where", [SHIPPED_STUDIES / "ttt-vs-gptq", Path("ttt-vs-gptq"), Path("ttt-vs-gptq/study.toml")]
)
def test_a_study_may_be_a_folder_and_stands_for_its_file(where):
    assert load_study(where).name == "ttt-vs-gptq"


def test_a_folder_without_a_study_is_told_apart_from_one_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="is a folder, not a study file, and holds no study.toml"):
        load_study(tmp_path)
    with pytest.raises(ConfigError, match="there is no such study file") as caught:
        load_study(tmp_path / "ttt-vs-gpt")
    assert "ttt-vs-gptq" in caught.value.hint


IN_FOLDERS = [path for path in sorted(SHIPPED_STUDIES.glob("*/*.toml")) if path.parent.name != "presets"]


@pytest.mark.parametrize("path", IN_FOLDERS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_study_in_a_folder_is_valid_and_named_after_it(path):
    assert load_study(path).name.startswith(path.parent.name)


def test_the_three_studies_ask_what_their_pages_say():
    gptq, smoke = (load_study(SHIPPED_STUDIES / "ttt-vs-gptq" / name) for name in ("study.toml", "smoke.toml"))
    assert gptq.factors == smoke.factors and len(gptq.cells) == 18
    assert gptq.from_runs == ("ttt-vs-gptq-proxy",)
    proxy = load_study(SHIPPED_STUDIES / "ttt-vs-gptq" / "proxy.toml")
    assert (proxy.name, proxy.config, len(proxy.confirm.seeds)) == ("ttt-vs-gptq-proxy", gptq.config, 3)
    full = load_study(SHIPPED_STUDIES / "wd-qk-ttt")
    assert (full.preset, full.resources.gpus_of_run, len(full.confirm.seeds)) == ("pr1326", 8, 3)
    assert set(full.space) == set(load_study(Path("wd-qk-ttt-smoke")).space)
    floor = load_study(SHIPPED_STUDIES / "noise-floor")
    assert len(floor.cells) * len(floor.confirm.seeds) == 18


def test_a_preset_may_be_a_file_and_its_errors_name_it(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text("[model]\nlayrs = 3\n")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: [model] has no key 'layrs'")) as caught:
        load_preset(str(path))
    assert "layers" in caught.value.hint


def test_a_preset_file_that_is_missing_is_answered_with_the_shipped_ones(tmp_path):
    with pytest.raises(ConfigError, match="there is no preset") as caught:
        load_preset(str(tmp_path / "pr1327.toml"))
    assert "pr1326" in caught.value.hint


def test_a_byte_order_mark_before_a_study_is_forgiven(tmp_path):
    (tmp_path / "tiny.toml").write_text("\ufeff" + study_text(), encoding="utf-8")
    assert load_study(tmp_path / "tiny.toml").name == "tiny"


def test_a_folder_is_no_study_file(tmp_path):
    with pytest.raises(ConfigError, match="is a folder, not a study file"):
        load_study(tmp_path)


def test_searching_on_the_confirmations_seeds_and_too_few_of_them_are_warned_of():
    first, second = tiny_study(seeds="[1, 42]", confirm="[42, 43]").warnings()
    assert "seeds [42] are searched and confirmed" in first
    assert "confirmation on 2 of the three seeds" in second
    assert tiny_study(confirm="[42, 43, 44]").warnings() == []


def test_a_record_attempt_is_a_study_without_a_search_that_its_own_text_gives_back():
    study = record_study(
        "smoke", data="pydoc", seeds=(42, 314), knobs={"ttt.lr": 0.004, "model.recurrence_layers": (2, 3), "runtime.compile": False},
        resources={"slots": 1},
    )  # fmt: skip
    assert (study.search.trials, study.space, study.confirm.seeds, study.resources.slots) == (0, {}, (42, 314), 1)
    assert knob_value(study.config, "ttt.lr") == 0.004
    assert parse_study(study.source) == study
    alone = record_study("smoke", data="pydoc", seeds=(1, 2, 3), knobs={})  # the seed of searches, but none was made
    assert alone.warnings() == []


def test_the_same_record_attempt_has_the_same_name_and_another_has_another():
    def name(**knobs):
        return record_study("smoke", data="pydoc", seeds=(42,), knobs=knobs).name

    assert name() == name() and name().startswith("record-smoke-")
    assert name(**{"ttt.lr": 0.1}) != name()
    assert record_study("smoke", data="pydoc", seeds=(1,), knobs={}, name="mine").name == "mine"


def test_a_record_attempt_without_test_time_training_is_scored_by_the_sliding_window():
    assert record_study("smoke", data="d", seeds=(1,), knobs={"ttt.method": "off"}).search.objective == SLIDING
    assert record_study("smoke", data="d", seeds=(1,), knobs={}).search.objective == TTT


def test_a_record_attempt_refuses_an_unknown_knob():
    with pytest.raises(ConfigError, match="there is no knob 'ttt.rate'"):
        record_study("smoke", data="d", seeds=(1,), knobs={"ttt.rate": 1})


def test_a_study_can_be_compared_by_its_text():
    assert tiny_study().digest == tiny_study().digest != tiny_study(trials=5).digest
    assert dataclasses.replace(tiny_study(), source="").digest != tiny_study().digest


def resources_of(lines):
    return tiny_study(resources=lines).resources


def test_gpus_of_a_run_may_be_told_in_all_or_by_node():
    for lines in ("nodes = 2\ngpus_per_run = 16", "nodes = 2\ngpus_per_node = 8"):
        found = resources_of(f'launcher = "slurm"\n{lines}')
        assert (found.gpus_of_run, found.gpus_of_node, found.processes_per_node) == (16, 8, 8)


def test_a_clusters_time_limit_follows_from_the_budgets_and_a_machines_does_not():
    cluster = tiny_study(resources='launcher = "slurm"')
    limits = cluster.config.limits
    assert cluster.timeout_minutes == (limits.train_seconds + limits.eval_seconds) / 60 + SLURM_MARGIN_MINUTES
    assert tiny_study().timeout_minutes == 60
    assert tiny_study(resources='launcher = "slurm"\ntimeout_minutes = 7').timeout_minutes == 7


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('partition = "gpu"', '[resources] partition is for launcher = "slurm"'),
        ("nodes = 2", '[resources] nodes is for launcher = "slurm"'),
        ('launcher = "slurm"\nnodes = 2\ngpus_per_run = 3', "[resources] gpus_per_run must be a multiple of nodes = 2"),
        (
            'launcher = "slurm"\nnodes = 2\ngpus_per_node = 4\ngpus_per_run = 4',
            "must be nodes × gpus_per_node = 8, got 4",
        ),
        ('launcher = "slurm"\nsbatch = { time = "1" }', "[resources] sbatch.time has a key of its own"),
        ('launcher = "slurm"\nsbatch = { requeue = true }', "sbatch.requeue: this option must be left to caddie"),
        ('launcher = "slurm"\nsbatch = { "--mem" = "0" }', "sbatch.--mem: this option must be left"),
        ('launcher = "slurm"\nsbatch = { mem = [1] }', "[resources] sbatch must be a table of texts and numbers"),
        ('launcher = "slurm"\nsbatch = 3', "[resources] sbatch must be a table of texts and numbers"),
    ],
)
def test_resources_that_a_cluster_cannot_give_are_refused_with_the_rule(lines, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        resources_of(lines)


def test_a_record_on_a_cluster_keeps_its_options_of_sbatch():
    asked = {"launcher": "slurm", "gpus_per_run": 8, "sbatch": {"mem": "0", "overcommit": True}}
    assert record_study("smoke", data="d", seeds=(1,), knobs={}, resources=asked).resources.sbatch == asked["sbatch"]


def test_a_grid_has_as_many_trials_as_points_and_the_preset():
    text = study_text().replace("high = 0.3", "high = 0.3\nstep = 0.1").replace("log = true", "step = 0.01")
    grid = text.replace("trials = 4", 'trials = 16\nsampler = "grid"')
    assert parse_study(grid).search.trials == 16  # three by five, and the preset
    with pytest.raises(ConfigError, match="trials must be at most 16, the grid's 15 points and the preset; got 17"):
        parse_study(grid.replace("trials = 16", "trials = 17"))


def test_a_race_without_a_search_needs_somebody_to_race_against():
    source = record_study("smoke", data="d", seeds=(1, 2, 3), knobs={}).source
    racing = source.replace("[confirm]", "[confirm]\nsequential = true")
    with pytest.raises(ConfigError, match="needs two arms, and nothing is searched"):
        parse_study(racing)
    assert parse_study(racing.replace("sequential = true", 'sequential = true\nagainst = "pr1493"')).confirm.sequential


def test_limits_are_the_configurations_and_the_studys_own():
    study = tiny_study(extra="[constraints]\nartifact_bytes = 400_000\npeak_memory_bytes = 8e9")
    assert study.limits["artifact_bytes"] == 400_000 and study.limits["peak_memory_bytes"] == 8e9
    assert study.limits["train_seconds"] == study.config.limits.train_seconds
    assert tiny_study().limits["artifact_bytes"] == 500_000
