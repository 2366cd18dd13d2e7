import json
import tomllib

import pytest
from make_ladder import DECAY, EMA, RUNGS, ladder_text, rungs_of_text

from orchestrator.errors import ConfigError
from orchestrator.study_file import parse_study

TWO = '[[rungs]]\nname = "proxy"\n[[rungs]]\nname = "full"\npromote = 2\n'


def test_a_ladder_is_a_chain_of_ordinary_studies_and_the_last_is_the_study_itself():
    proxy, mid, full = rungs_of_text()
    assert [rung.name for rung in (proxy, mid, full)] == ["tiny-proxy", "tiny-mid", "tiny"]
    assert {rung.ladder for rung in (proxy, mid, full)} == {"tiny"}
    assert [rung.search.trials for rung in (proxy, mid, full)] == [6, 4, 3]
    assert [rung.config.limits.train_seconds for rung in (proxy, mid)] == [12, 60]
    assert full == parse_study(ladder_text())
    assert mid.other_rungs == ("tiny-proxy", "tiny")


def test_trials_are_stopped_early_on_the_first_rung_and_confirmed_on_the_last():
    studies = rungs_of_text()
    assert [study.stop_early is not None for study in studies] == [True, False, False]
    assert [study.confirm is not None for study in studies] == [False, False, True]


def test_what_a_rungs_ledger_holds_gives_the_rung_again():
    for study in rungs_of_text():
        assert parse_study(study.source) == study
    assert tomllib.loads(rungs_of_text()[0].source)["rung"] == "proxy"


def test_a_rung_has_resources_of_its_own_beside_the_studys():
    rungs = TWO.replace('"proxy"', '"proxy"\ngpus_per_run = 1\nslots = 3\ntimeout_minutes = 5')
    proxy, full = rungs_of_text(rungs=rungs, resources="gpus_per_run = 8")
    assert (proxy.resources.gpus_of_run, proxy.resources.slots, proxy.timeout_minutes) == (1, 3, 5)
    assert (full.resources.gpus_of_run, full.resources.slots, full.timeout_minutes) == (8, 2, 60)


def test_a_rungs_count_of_gpus_replaces_the_studys_however_that_is_given():
    rungs = TWO.replace('"proxy"', '"proxy"\ngpus_per_run = 1\nnodes = 1')
    proxy, full = rungs_of_text(rungs=rungs, resources='launcher = "slurm"\nnodes = 2\ngpus_per_node = 8')
    assert (proxy.resources.gpus_of_run, full.resources.gpus_of_run) == (1, 16)


def test_a_rung_that_its_machine_could_not_take_is_refused_by_its_name():
    with pytest.raises(ConfigError, match=r"rung 'proxy': \[resources\] nodes is for launcher"):
        rungs_of_text(rungs=TWO.replace('"proxy"', '"proxy"\nnodes = 2'))


def test_the_same_configuration_on_another_number_of_gpus_is_another_run():
    rungs = TWO.replace('name = "proxy"', 'name = "proxy"\ngpus_per_run = 1')
    assert [study.gpus_apart for study in rungs_of_text(rungs=rungs, resources="gpus_per_run = 8")] == [1, 0]
    assert [study.gpus_apart for study in rungs_of_text(rungs=TWO, resources="gpus_per_run = 8")] == [0, 0]


def test_a_knob_that_does_not_transfer_is_searched_on_every_rung():
    for study in rungs_of_text():
        assert set(study.space) == {DECAY, EMA} and study.not_transferring == (EMA,)


def _with(line, name="full"):
    return RUNGS.replace(f'name = "{name}"', f'name = "{name}"\n{line}')


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"rungs": '[[rungs]]\nname = "one"\n'}, "a ladder needs two rungs, got 1", r"leave \[\[rungs\]\] out"),
        ({"rungs": "rungs = 3\n", "top": True}, r"rungs must be tables \[\[rungs\]\], got 3", "proxy"),
        ({"rungs": TWO.replace("proxy", "full")}, r"names 'full' twice", "called by"),
        ({"rungs": TWO.replace('"proxy"', '"Proxy/1"')}, "name must be lower-case letters.*'Proxy/1'", None),
        ({"rungs": TWO.replace('name = "proxy"', "")}, "the 1. has none", None),
        ({"rungs": _with("gpu_per_run = 1")}, "rung 'full' has no key 'gpu_per_run'", "did you mean 'gpus_per_run'"),
        ({"rungs": TWO.replace('"proxy"', '"proxy"\npromote = 2')}, "is the first, nothing comes up to it", "leave it out"),
        ({"rungs": TWO.replace('"proxy"', '"proxy"\ntrials = 2')}, "is the first", r"those of \[search\]"),
        ({"rungs": TWO.replace("promote = 2", "")}, "promote must be a whole number of at least 1, got nothing", "promote = 3"),
        ({"rungs": TWO.replace("promote = 2", "promote = 0")}, "at least 1, got 0", None),
        ({"rungs": TWO.replace("promote = 2", "promote = true")}, "got True", None),
        ({"rungs": TWO.replace("promote = 2", "promote = 6")}, "promote is 6, and 'proxy' has 5 points", "promote = 5"),
        ({"rungs": TWO, "trials": 1}, "has 0 points beside the preset", "more trials"),
        ({"rungs": _with("trials = 2")}, r"trials must be a whole number of at least promote \+ 1", "trials = 3"),
        ({"rungs": _with("least_rank_correlation = 2")}, "between -1 and 1, got 2", None),
        ({"rungs": _with("least_rank_correlation = 0.3", "mid")}, "needs two rungs below", "put a rung between"),
        (
            {"rungs": _with("least_rank_correlation = 0.3").replace("promote = 3", "promote = 2")},
            "needs 4 points on both rungs below, 'mid' shares 3", "promote = 3 or more",
        ),
        ({"rungs": _with("set = 3")}, "set must be a table of knobs", None),
        ({"rungs": TWO + f'[rungs.set]\n"{DECAY}" = 0.1\n'}, f"rung 'full' sets {DECAY}, which", "one of the two"),
        ({"rungs": TWO + '[rungs.set]\n"limits.train_second" = 1\n'}, "train_second", "did you mean"),
        ({"rungs": RUNGS.replace("train_seconds", "train_second", 1)}, "rung 'proxy': .*train_second", "did you mean"),
        ({"ema": "transfers = 1"}, "transfers must be true or false, got 1", None),
        ({"rungs": "", "ema": "transfers = false"}, r"transfers goes with \[\[rungs\]\]", "leave it out"),
        ({"extra": '[interleave]\nagainst = "smoke"'}, r"\[\[rungs\]\] and interleave exclude one another", "search"),
        ({"extra": "[noise]"}, r"\[\[rungs\]\] and noise", None),
    ],
)  # fmt: skip
def test_a_ladder_that_cannot_be_climbed_is_refused_with_the_rung_and_a_remedy(changes, message, hint):
    is_top = changes.pop("top", False)
    text = ladder_text(**{**changes, "rungs": ""}) if is_top else ladder_text(**changes)
    with pytest.raises(ConfigError, match=message) as caught:
        parse_study(changes["rungs"] + text if is_top else text)
    if hint:
        assert caught.value.hint
        with pytest.raises(AssertionError, match=hint):
            raise AssertionError(caught.value.hint)


def test_a_ladder_of_knobs_that_all_do_not_transfer_is_refused():
    text = ladder_text().replace("high = 0.3", "high = 0.3\ntransfers = false")
    with pytest.raises(ConfigError, match="no knob of .* transfers"):
        parse_study(text)


def test_only_caddie_names_a_rung_before_the_text():
    with pytest.raises(ConfigError, match="there is no rung 'middle'") as caught:
        parse_study('rung = "middle"\n' + ladder_text())
    assert caught.value.hint == "did you mean 'mid'?"
    with pytest.raises(ConfigError, match="for the texts that caddie writes"):
        parse_study('\n\nrung = "mid"\n' + ladder_text())
    with pytest.raises(ConfigError, match="no key 'rung'"):
        parse_study('rung = "mid"\n' + ladder_text(rungs="", ema=""))


def test_a_ladders_identity_is_that_of_an_ordinary_study():
    from orchestrator.identity import identity_of

    plain = parse_study(ladder_text(rungs="", ema=""))
    whole = parse_study(ladder_text())
    kinds = {"manifest_sha256": "m", "bundle_sha256": "b"}
    assert json.dumps(identity_of(plain, **kinds)) == json.dumps(identity_of(whole, **kinds))


def test_the_studys_own_set_must_be_a_table_before_a_rungs_is_laid_over_it():
    head, _, rest = ladder_text().partition("[set]")
    _, space, tail = rest.partition("[space")
    with pytest.raises(ConfigError, match=r"\[set\] must be a table of knobs, got 3"):
        parse_study(f"set = 3\n{head}{space}{tail}")
