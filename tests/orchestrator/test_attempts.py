import dataclasses
import os
import shutil
import time

import pytest
from fakes import FakeLauncher, FakeSearch, Listener, failed, scored, tiny_study, write_plans
from make_controller import Killed, controller, die_at, records

from orchestrator import attempts, ledger, slots
from orchestrator.allocation import Allocation
from orchestrator.claims import claim_for, make_claim
from orchestrator.errors import ConfigError, DataError, ProtocolError, StorageError, StudyFailed
from orchestrator.launcher import LocalLauncher
from orchestrator.ports import Ending, Unanswered
from trainer import protocol
from trainer.protocol import DATA, DISK, INFRASTRUCTURE, NODE, PREEMPTED, read_spec


def test_a_run_that_another_study_works_on_is_waited_for(home):
    first = controller(tiny_study(trials=1, confirm=None), home)
    run = first._plan(ledger.Trial(number=0, origin="preset", params=FakeSearch().point(0), runs={}), 1)
    run.attempt(1).root.mkdir(parents=True)

    class Elsewhere(FakeLauncher):
        asked = 0

        def is_alive(self, attempt, *, tag):
            if tag is not None or attempt.number != 1:
                return super().is_alive(attempt, tag=tag)
            self.asked += 1
            if self.asked == 3:
                protocol.write_result(attempt.result, scored(run, attempt, protocol.read_spec(run.spec), bpb=1.25))
            return self.asked < 3

    launcher = Elsewhere()
    state = controller(tiny_study(trials=1, confirm=None), home, launcher=launcher).run()
    assert launcher.submitted == [] and state.trials[0].value == 1.25


def test_a_failure_of_the_machine_makes_a_new_attempt_of_the_same_run(home):
    launcher = FakeLauncher(behaviours={(1, 1): failed(INFRASTRUCTURE), (1, 2): lambda *a: None})
    state = controller(tiny_study(trials=1, confirm=None), home, launcher=launcher).run()
    (run_id,) = state.run_ids
    assert [(a.number, a.status, a.failure) for a in state.attempts_of(run_id)] == [
        (1, "failed", INFRASTRUCTURE), (2, "failed", INFRASTRUCTURE), (3, "complete", None),
    ]  # fmt: skip
    assert state.trials[0].state == "complete"
    lost = protocol.read_result(home.run(run_id).attempt(2).result)
    assert "its worker was killed, or could not start" in lost.failure.message


def test_a_trainer_that_was_ended_without_being_asked_to_stop_is_run_again(home):
    """A machine that shuts down sends SIGTERM, and the trainer leaves a result that says stopped."""

    def told_to_end(run, attempt, spec):
        protocol.write_result(
            attempt.result,
            protocol.Result(run_id=spec.run_id, attempt=attempt.number, status=protocol.STOPPED, seed=spec.seed),
        )

    state = controller(
        tiny_study(trials=1, confirm=None), home, launcher=FakeLauncher(behaviours={(1, 1): told_to_end})
    ).run()
    (run_id,) = state.run_ids
    assert [(a.status, a.failure) for a in state.attempts_of(run_id)] == [
        ("failed", INFRASTRUCTURE),
        ("complete", None),
    ]
    assert "no study asked for it" in protocol.read_result(home.run(run_id).attempt(1).result).failure.message


@pytest.mark.parametrize("leaves_result", [True, False])
def test_a_run_whose_time_is_up_is_not_run_again_whoever_reads_of_it_first(home, leaves_result):
    """Its worker may not have come to its own words: the trainer leaves a result that says stopped, or all were killed."""

    def overdue(run, attempt, spec):
        attempt.overdue.touch()
        if leaves_result:
            protocol.write_result(
                attempt.result,
                protocol.Result(run_id=spec.run_id, attempt=attempt.number, status=protocol.STOPPED, seed=spec.seed),
            )

    study = tiny_study(trials=1, confirm=None, resources="timeout_minutes = 3")
    launcher = FakeLauncher(behaviours={(1, 1): overdue})
    with pytest.raises(StudyFailed, match="timeout: ended after 180 s, the study's"):
        controller(study, home, launcher=launcher).run()
    assert len(launcher.submitted) == 1


@pytest.mark.parametrize("left", ["nothing", "stopped"])
def test_hours_in_which_nobody_looked_are_not_charged_to_what_had_ended(home, left):
    """Of a controller that comes back after a night, the attempts that died in the evening."""
    began, ended = time.time() - 40_000, time.time() - 39_900

    def dies(run, attempt, spec):
        make_claim(attempt, dataclasses.replace(claim_for(Allocation()), began=began))
        if left == "stopped":
            stopped = protocol.Result(
                run_id=spec.run_id, attempt=attempt.number, status=protocol.STOPPED, seed=spec.seed
            )
            protocol.write_result(attempt.result, stopped)
        for path in attempt.root.iterdir():
            os.utime(path, (ended, ended))

    state = controller(tiny_study(trials=1, confirm=None), home, launcher=FakeLauncher(behaviours={(1, 1): dies})).run()
    lost, again = state.attempts.values()
    assert [(a.failure, round(a.seconds)) for a in (lost, again)] == [(INFRASTRUCTURE, 100), (None, 0)]
    assert lost.ended == pytest.approx(ended, abs=0.01)


def test_a_damaged_result_is_its_runs_failure(home):
    class Damaging(FakeLauncher):
        def _end(self, run, attempt):
            if protocol.read_spec(run.spec).trial == 1:
                attempt.result.write_text("{")
            else:
                super()._end(run, attempt)

    state = controller(tiny_study(confirm=None), home, launcher=Damaging()).run()
    assert state.trials[1].state == "failed" and "not a JSON object" in state.trials[1].reason


def killed_before_submitted(home, study, launcher):
    """Decided, and dead before the ledger heard of the job."""
    first = die_at(controller(study, home, launcher=launcher), ledger.SUBMITTING)
    with pytest.raises(Killed):
        first.run()
    (attempt,) = first.ledger.state().attempts.values()
    return attempt, home.run(attempt.run_id).attempt(1)


def test_a_job_that_was_started_before_the_ledger_heard_of_it_is_found_by_its_tag(home):
    launcher, study = FakeLauncher(), tiny_study(trials=1, confirm=None)
    attempt, _ = killed_before_submitted(home, study, launcher)
    launcher.alive[attempt.tag] = 3
    state = controller(study, home, launcher=launcher).run()
    assert launcher.submitted == []
    assert [a.job_id for a in state.attempts.values()] == ["found"]


@pytest.mark.parametrize("left", ["claim", "result"])
def test_a_job_that_ran_and_ended_unheard_is_not_run_again_under_its_number(home, left):
    launcher, study = FakeLauncher(), tiny_study(trials=1, confirm=None)
    attempt, files = killed_before_submitted(home, study, launcher)
    run = home.run(attempt.run_id)
    if left == "claim":
        protocol.write_bytes_atomically(files.claim, b"{}")
    else:
        protocol.write_result(files.result, scored(run, files, protocol.read_spec(run.spec)))
    state = controller(study, home, launcher=launcher).run()
    assert [number for _, number, _ in launcher.submitted] == ([2] if left == "claim" else [])
    assert state.trials[0].state == "complete"


def test_a_restart_holds_the_slots_of_what_still_runs(home):
    launcher, study = FakeLauncher(polls=50), tiny_study()
    with pytest.raises(Killed):
        die_at(controller(study, home, launcher=launcher), ledger.SUBMITTED, 2).run()
    controller(study, home, launcher=launcher).run()
    assert launcher.most_alive == 2


def test_a_result_that_vanished_before_it_was_told_is_an_error_with_its_place(home):
    study = tiny_study(trials=1, confirm=None)
    first = die_at(controller(study, home), ledger.ENDED)
    with pytest.raises(Killed):
        first.run()
    (run_id,) = first.state.run_ids
    home.run(run_id).attempt(1).result.unlink()
    with pytest.raises(ProtocolError, match="missing, though the ledger says that the attempt ended"):
        controller(study, home).run()


@pytest.mark.parametrize("left", ["nothing", "result", "stop"])
def test_processes_that_do_not_leave_in_time_are_ended(home, monkeypatch, left):
    monkeypatch.setattr(attempts, "LEAVE_SECONDS", 0.0)

    class Orphaned(FakeLauncher):
        def is_alive(self, attempt, *, tag):
            run = home.run(attempt.root.parent.parent.name)
            if left == "result" and not attempt.result.exists():
                protocol.write_result(attempt.result, scored(run, attempt, protocol.read_spec(run.spec)))
            if left == "stop" and not attempt.stop.exists():
                home.study("tiny").stop.write_text("cancel")
            return bool(self.alive)

        def cancel(self, tag):
            self.cancelled.append(tag)
            self.alive.clear()

    study = tiny_study(trials=1, confirm=None, resources="timeout_minutes = 0.001\nmax_attempts = 1")
    launcher, listener = Orphaned(), Listener()
    if left == "nothing":
        with pytest.raises(StudyFailed, match="none of its 1 trials completed: infrastructure"):
            controller(study, home, launcher=launcher, listener=listener).run()
    else:
        state = controller(study, home, launcher=launcher, listener=listener).run()
        assert state.closed == {"result": "finished", "stop": "stopped"}[left]
    assert launcher.cancelled and any("did not leave and are ended" in note for note in listener.notes)


def test_a_real_job_whose_trainer_is_killed_is_run_again(home):
    write_plans(home, {"*": {"mode": "killed", "attempts": [1]}})
    state = controller(tiny_study(trials=1, confirm=None), home, launcher=LocalLauncher(), poll_seconds=0.02).run()
    assert [(a.status, a.failure) for a in state.attempts.values()] == [("failed", INFRASTRUCTURE), ("complete", None)]


@pytest.mark.parametrize("reason", [ledger.CANCELLED, ledger.MEDIAN])
def test_a_stop_that_was_decided_and_not_yet_asked_for_is_asked_for_after_a_restart(home, reason):
    launcher, study = FakeLauncher(polls=500), tiny_study(trials=1, confirm=None)
    with pytest.raises(Killed):
        die_at(controller(study, home, launcher=launcher), ledger.SUBMITTED).run()
    book = ledger.Ledger(home.study("tiny").ledger)
    (attempt,) = book.state().attempts.values()
    book.append(ledger.STOP_ASKED, run_id=attempt.run_id, attempt=1, reason=reason)
    stop = home.run(attempt.run_id).attempt(1).stop
    again = controller(study, home, launcher=launcher)
    if reason == ledger.MEDIAN:
        with pytest.raises(StudyFailed, match="none of its 1 trials completed: stopped early"):
            again.run()
    else:
        assert [a.status for a in again.run().attempts.values()] == ["stopped", "complete"]
    assert stop.exists()


def test_a_stop_is_asked_for_once_and_keeps_its_first_reason_and_its_time(home):
    launcher, study = FakeLauncher(polls=500), tiny_study(trials=1, confirm=None)
    first = die_at(controller(study, home, launcher=launcher), ledger.SUBMITTED)
    with pytest.raises(Killed):
        first.run()
    again = controller(study, home, launcher=launcher)
    again.ledger.open()
    (attempt,) = again.attempts.open
    for reason in (ledger.MEDIAN, ledger.CANCELLED):
        again.attempts.stop(attempt, reason)
    assert attempt.stop_reason == ledger.MEDIAN
    stop = home.run(attempt.run_id).attempt(1).stop
    asked = stop.stat().st_mtime_ns
    again.attempts.reattach()
    assert stop.stat().st_mtime_ns == asked


def test_a_run_that_another_study_has_just_submitted_is_not_started_beside_it(home, monkeypatch):
    monkeypatch.setattr(attempts, "BEGIN_SECONDS", 60.0)
    study = tiny_study(trials=1, confirm=None)
    one = controller(study, home)
    one.ledger.open()
    run = one._plan(ledger.Trial(number=0, origin="preset", params=FakeSearch().point(0), runs={}), 1)
    assert not one.attempts.is_elsewhere(run)
    other = run.attempt(1)
    other.scheduler.mkdir(parents=True)
    assert one.attempts.is_elsewhere(run)
    protocol.write_result(other.result, scored(run, other, protocol.read_spec(run.spec)))
    assert not one.attempts.is_elsewhere(run)


def test_a_full_disk_is_never_a_trials_failure_and_the_same_command_goes_on(home):
    behaviours = {(1, 1): failed(DISK, "checkpoint: cannot be written: No space left on device")}
    study = tiny_study(slots=1)
    launcher = FakeLauncher(behaviours=behaviours)
    with pytest.raises(StorageError, match="attempt 1: checkpoint: cannot be written: No space") as caught:
        controller(study, home, launcher=launcher).run()
    assert (caught.value.exit_code, "same command" in caught.value.hint) == (6, True)
    state = controller(study, home).run()
    assert [trial.state for trial in state.trials.values()] == ["complete"] * 4
    assert [a.failure for a in state.attempts_of(state.trials[0].runs[1])] == [DISK, None]


def test_a_damaged_data_set_is_never_a_trials_failure_and_the_same_command_goes_on(home):
    behaviours = {(1, 1): failed(DATA, "train_000000.bin: the shard is truncated")}
    study = tiny_study(slots=1)
    with pytest.raises(DataError, match="attempt 1: train_000000.bin: the shard is truncated") as caught:
        controller(study, home, launcher=FakeLauncher(behaviours=behaviours)).run()
    assert caught.value.hint.startswith("mend the data set; nothing was lost: the same command")
    state = controller(study, home).run()
    assert [trial.state for trial in state.trials.values()] == ["complete"] * 4


def test_a_disk_that_was_full_when_nobody_looked_does_not_end_the_next_controller(home):
    launcher, study = FakeLauncher(polls=500), tiny_study(trials=1, confirm=None)
    with pytest.raises(Killed):
        die_at(controller(study, home, launcher=launcher), ledger.SUBMITTED).run()
    ((run_id, _, tag),) = launcher.submitted
    run = home.run(run_id)
    protocol.write_result(run.attempt(1).result, failed(DISK)(run, run.attempt(1), protocol.read_spec(run.spec)))
    del launcher.alive[tag]
    state = controller(study, home).run()
    assert [a.failure for a in state.attempts.values()] == [DISK, None] and state.closed == "finished"


def test_a_job_whose_log_names_the_full_disk_is_no_failure_of_the_machine(home):
    def leave_a_log(run, attempt, spec):
        attempt.scheduler.mkdir(parents=True)
        (attempt.scheduler / "7_0_log.err").write_text("StorageError: claim.json: No space left on device\n")

    launcher = FakeLauncher(behaviours={(1, 1): leave_a_log})
    study = tiny_study(trials=1, confirm=None)
    with pytest.raises(StorageError, match="left no result: no space was left for one"):
        controller(study, home, launcher=launcher).run()
    assert controller(study, home).run().trials[0].state == "complete"


def test_a_run_whose_directory_was_deleted_under_way_is_planned_and_run_again(home):
    class Deleting(FakeLauncher):
        def _end(self, run, attempt):
            if attempt.number == 1:
                shutil.rmtree(run.root)
            else:
                super()._end(run, attempt)

    state = controller(tiny_study(trials=1, confirm=None), home, launcher=Deleting()).run()
    assert [a.failure for a in state.attempts.values()] == [INFRASTRUCTURE, None]
    assert home.run(state.run_ids[0]).spec.exists()


class Silent(FakeLauncher):
    """Gives no answer for a while, and may have taken the job all the same."""

    def __init__(self, *, silences=2, takes=False, **fields):
        super().__init__(**fields)
        self.silences, self.takes = silences, takes
        self.questions = 0

    def submit(self, run, attempt, *, tag, resources):
        if self.silences:
            self.silences -= 1
            if self.takes:
                super().submit(run, attempt, tag=tag, resources=resources)
            raise Unanswered("sbatch: Socket timed out")
        return super().submit(run, attempt, tag=tag, resources=resources)

    def find(self, attempt, *, tag):
        self.questions += 1
        if self.questions == 1:
            raise Unanswered("squeue: Socket timed out")
        return super().find(attempt, tag=tag)


@pytest.mark.parametrize("takes", [True, False])
def test_a_submission_without_an_answer_is_made_again_only_if_the_scheduler_has_no_job_of_the_name(
    home, monkeypatch, takes
):
    monkeypatch.setattr(attempts, "ASK_AGAIN_SECONDS", 0.0)
    launcher, listener = Silent(silences=1 if takes else 2, takes=takes, polls=20), Listener()
    state = controller(tiny_study(trials=1, confirm=None), home, launcher=launcher, listener=listener).run()
    assert len(launcher.submitted) == 1 and state.trials[0].state == "complete"
    assert [a.number for a in state.attempts.values()] == [1] and launcher.questions > 1
    assert (
        len([note for note in listener.notes if "sbatch: Socket timed out; asked again until it answers" in note]) == 1
    )


def test_a_job_that_ended_while_nobody_could_ask_is_not_submitted_again(home, monkeypatch):
    monkeypatch.setattr(attempts, "ASK_AGAIN_SECONDS", 0.0)

    class Ends(Silent):
        def find(self, attempt, *, tag):
            run = home.run(attempt.root.parent.parent.name)
            protocol.write_result(attempt.result, scored(run, attempt, protocol.read_spec(run.spec)))

    launcher = Ends(silences=1)
    state = controller(tiny_study(trials=1, confirm=None), home, launcher=launcher).run()
    assert launcher.submitted == [] and state.trials[0].state == "complete"


def test_a_restart_waits_for_a_scheduler_that_does_not_answer_and_follows_the_rest(home, monkeypatch):
    monkeypatch.setattr(attempts, "ASK_AGAIN_SECONDS", 0.0)
    study = tiny_study(trials=1, confirm=None)
    killed_before_submitted(home, study, FakeLauncher())
    launcher = Silent(silences=0)
    state = controller(study, home, launcher=launcher).run()
    assert len(launcher.submitted) == 1 and launcher.questions == 2 and state.trials[0].state == "complete"


@pytest.mark.parametrize("slot", [0, 1])
def test_what_was_decided_and_never_submitted_is_submitted_as_it_was_decided(home, slot):
    study, launcher = tiny_study(trials=1, confirm=None, slots=2), FakeLauncher()
    first = die_at(controller(study, home, launcher=launcher), ledger.SUBMITTING)
    if slot:  # the first slot is taken at that moment, and free when the next controller comes
        first.attempts.slots.occupy("another", slot=0, gpus=())
    with pytest.raises(Killed):
        first.run()
    controller(study, home, launcher=launcher).run()
    decided = [record for record in records(home) if record["kind"] == ledger.SUBMITTING]
    assert [record["resources"]["slot"] for record in decided] == [slot]
    assert len(launcher.submitted) == 1


def test_what_was_never_submitted_is_submitted_with_the_resources_that_were_mended_meanwhile(home):
    class Refusing(FakeLauncher):
        def submit(self, run, attempt, *, tag, resources):
            raise ConfigError("sbatch refuses the job: too long")

    with pytest.raises(ConfigError, match="too long"):
        controller(tiny_study(trials=1, confirm=None, resources="timeout_minutes = 9"), home, launcher=Refusing()).run()
    study = tiny_study(trials=1, confirm=None, resources="timeout_minutes = 3")
    state = controller(study, home).run()
    (attempt,) = state.attempts.values()
    assert (attempt.number, attempt.resources["timeout_seconds"], attempt.status) == (1, 180.0, "complete")


@pytest.mark.parametrize(("where", "beside"), [("", 3), ('launcher = "slurm"', 1)])
def test_a_job_of_this_machine_knows_how_many_share_it_and_one_of_a_cluster_has_its_own(home, where, beside):
    state = controller(tiny_study(trials=1, confirm=None, slots=3, resources=where), home).run()
    assert [attempt.resources["beside"] for attempt in state.attempts.values()] == [beside]


class Shared(FakeLauncher):
    """A machine on whose first GPU somebody else has a job: what is given it is refused before it begins."""

    def __init__(self):
        super().__init__()
        self.slots = []

    def submit(self, run, attempt, *, tag, resources):
        self.slots.append(resources.slot)
        job = super().submit(run, attempt, tag=tag, resources=resources)
        if resources.slot == 0:
            run.attempt(attempt).events.unlink()
            protocol.write_result(
                run.attempt(attempt).result, failed(NODE)(run, run.attempt(attempt), read_spec(run.spec))
            )
            self.alive[tag] = 0
        return job

    def _end(self, run, attempt):
        if not attempt.result.exists():
            super()._end(run, attempt)


def test_a_gpu_that_somebody_else_uses_costs_one_refusal_and_the_study_goes_on_with_the_others(home):
    launcher, listener = Shared(), Listener()
    state = controller(tiny_study(trials=6, confirm=None, slots=2), home, launcher=launcher, listener=listener).run()
    assert [trial.state for trial in state.trials.values()] == ["complete"] * 6
    assert launcher.slots.count(0) == 1 and launcher.slots.count(1) == 6
    assert "slot 0 gets no run for 15 s" in listener.notes
    (refused,) = (attempt for attempt in state.attempts.values() if attempt.is_refused)
    assert refused.resources["slot"] == 0 and state.attempts_of(refused.run_id)[-1].status == "complete"


def test_the_only_slot_is_tried_again_after_its_rest(home, monkeypatch):
    monkeypatch.setattr(slots, "REST_SECONDS", (0.05, 0.1))
    launcher = Shared()
    study = tiny_study(trials=1, confirm=None, slots=1, resources="max_attempts = 2")
    controlled = controller(study, home, launcher=launcher)
    started = time.monotonic()
    with pytest.raises(StudyFailed):
        controlled.run()
    assert launcher.slots == [0, 0, 0] and time.monotonic() - started >= 0.15  # the first refusal costs no attempt


class Cluster(FakeLauncher):
    """Runs everything on one node, and says how what left no result ended."""

    has_queue = True

    def __init__(self, kind, **fields):
        super().__init__(**fields)
        self.kind = kind

    def ending(self, attempt, *, tag):
        return Ending(kind=self.kind, message=f"the scheduler says {self.kind}")

    def nodes_of(self, attempt, *, tag):
        return ("node7",)


@pytest.mark.parametrize("kind", [NODE, PREEMPTED, INFRASTRUCTURE])
def test_why_an_attempt_left_no_result_is_the_schedulers_to_say(home, kind):
    launcher = Cluster(kind, behaviours={(1, 1): lambda *a: None})
    state = controller(tiny_study(trials=1, confirm=None), home, launcher=launcher).run()
    first, second = state.attempts.values()
    assert (first.failure, first.nodes, second.status) == (kind, ("node7",), "complete")
    lost = protocol.read_result(home.run(first.run_id).attempt(1).result)
    assert lost.failure.message == f"the scheduler says {kind}"
    assert launcher.cancelled == [first.tag], "what is left of it, on a node that is not heard, say"


def test_a_run_may_be_pre_empted_more_often_than_it_may_fail(home):
    launcher = Cluster(PREEMPTED, behaviours={(1, n): (lambda *a: None) for n in range(1, 6)})
    study = tiny_study(trials=1, confirm=None, resources="max_attempts = 1")
    state = controller(study, home, launcher=launcher).run()
    assert [a.failure for a in state.attempts.values()] == [PREEMPTED] * 5 + [None]
    assert state.excluded_nodes == []


def test_a_run_that_is_pre_empted_for_ever_comes_to_an_end(home, monkeypatch):
    monkeypatch.setattr(ledger, "MOST_PREEMPTIONS", 4)
    launcher = Cluster(PREEMPTED, behaviours={"*": lambda *a: None})
    with pytest.raises(StudyFailed, match="preempted: the scheduler says preempted"):
        controller(tiny_study(trials=1, confirm=None, resources="max_attempts = 2"), home, launcher=launcher).run()
    assert len(launcher.submitted) == 6


def test_a_trainer_that_left_on_notice_was_pre_empted(home):
    def noticed(run, attempt, spec):
        attempt.notice.touch()
        return scored(run, attempt, spec, status=protocol.STOPPED, scores={})

    launcher = FakeLauncher(behaviours={(1, 1): noticed})
    state = controller(tiny_study(trials=1, confirm=None), home, launcher=launcher).run()
    assert [a.failure for a in state.attempts.values()] == [PREEMPTED, None]


def test_time_in_a_queue_is_neither_charged_nor_counted(home):
    launcher = Cluster(INFRASTRUCTURE, polls=20)
    study = tiny_study(trials=1, confirm=None, resources="timeout_minutes = 0.0001")
    state = controller(study, home, launcher=launcher).run()
    (attempt,) = state.attempts.values()
    assert (attempt.status, attempt.seconds, launcher.cancelled) == ("complete", 0.0, [])
