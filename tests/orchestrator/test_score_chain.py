import copy
import dataclasses
import math

import pytest

from orchestrator.score_chain import problems
from trainer import protocol
from trainer.protocol import EventLog, Result, Score, ScoreChain, read_lines, read_result, write_result

ARTIFACT = "0f" * 32
SIZES = (4, 4, 4, 2)  # positions of each chunk


def score_of(nats, tokens, scored_bytes):
    return Score(nats=nats, tokens=tokens, bytes=scored_bytes, loss=1.0, bpb=1.0, seconds=1.0)


def told(path, stages=(protocol.SLIDING, protocol.TTT)):
    """The events and the result of an attempt as the trainer leaves them: files, read again."""
    log, scores, chains = EventLog(path / "events.jsonl"), {}, {}
    for stage in stages:
        chain, first, nats = ScoreChain(log, stage, ARTIFACT), 0, []
        for chunk, size in enumerate(SIZES):
            nats.append(size * 1.1 + chunk / 3)
            chain.scored(chunk, first, first + size, nats=nats[-1], tokens=size, bytes=3 * size)
            if stage == protocol.TTT and chunk < len(SIZES) - 1:
                chain.learned(chunk, first, first + size)
            first += size
        scores[stage], chains[stage] = score_of(math.fsum(nats), first, 3 * first), chain.link
    result = Result(
        run_id="r", attempt=1, status=protocol.COMPLETE, seed=1, scores=scores, chains=chains, artifact_sha256=ARTIFACT
    )
    write_result(path / "result.json", result)
    return [event for _, event in read_lines(path / "events.jsonl")], read_result(path / "result.json")


@pytest.fixture
def evidence(tmp_path):
    return told(tmp_path)


def of(events, kind, stage, chunk):
    return next(e for e in events if (e["kind"], e["stage"], e["chunk"]) == (kind, stage, chunk))


def rechained(events, result):
    """What a forger would write: the same events with links that follow from them, and their last ones in the result."""
    links = {stage: protocol.first_link(stage, ARTIFACT) for stage in result.scores}
    for event in events:
        if event["kind"] == protocol.SCORED:
            record = {name: value for name, value in event.items() if name not in ("kind", "t", "chain")}
            event["chain"] = links[event["stage"]] = protocol.next_link(links[event["stage"]], record)
    return events, dataclasses.replace(result, chains=links)


def test_what_the_trainer_writes_has_no_problem(evidence):
    assert problems(*evidence) == []


def test_other_events_in_between_are_of_no_concern(evidence):
    events, result = evidence
    assert problems([{"kind": "start", "t": 0.0}, *events, {"kind": "metric", "values": {}}], result) == []


def test_a_chunk_whose_nats_were_edited_breaks_its_own_link_and_the_sum(evidence):
    events, result = evidence
    of(events, protocol.SCORED, protocol.TTT, 1)["nats"] -= 0.5
    found = problems(events, result)
    assert len(found) == 2
    assert found[0].startswith("ttt, chunk 1: the chain is broken: its link is ")
    assert "ttt: its chunks add up to" in found[1] and "nats, the result claims" in found[1]


def test_a_score_that_was_edited_is_not_the_sum_of_its_chunks(evidence):
    events, result = evidence
    worse = result.scores[protocol.TTT]
    result.scores[protocol.TTT] = dataclasses.replace(worse, nats=math.nextafter(worse.nats, 0), bytes=worse.bytes + 1)
    kinds = [problem.rpartition(", the result claims")[0].split()[-1] for problem in problems(events, result)]
    assert kinds == ["nats", "bytes"]


def test_a_result_swapped_for_another_run_s_ends_in_another_link(evidence):
    events, result = evidence
    swapped = dataclasses.replace(result, chains={**result.chains, protocol.SLIDING: "ab" * 32})
    assert problems(events, swapped)[0].startswith("sliding: the chain ends in ")
    assert "the result holds None" in problems(events, dataclasses.replace(result, chains={}))[0]


def test_events_of_another_artifact_do_not_chain(evidence):
    events, result = evidence
    found = problems(events, dataclasses.replace(result, artifact_sha256="1f" * 32))
    assert [problem.partition(": its link")[0] for problem in found] == [
        "sliding, chunk 0: the chain is broken",
        "ttt, chunk 0: the chain is broken",
    ]


def test_a_chunk_learned_before_it_was_scored_is_told_however_well_it_is_chained(evidence):
    events, result = evidence
    early = of(events, protocol.LEARNED, protocol.TTT, 2)
    events.remove(early)
    events.insert(events.index(of(events, protocol.SCORED, protocol.TTT, 2)), early)
    assert problems(*rechained(events, result)) == [
        "ttt, chunk 2: it was learned before it was scored, positions 8 to 11"
    ]


@pytest.mark.parametrize(
    ("first", "fault"),
    [(3, "it scores again positions 3 to 3"), (5, "it leaves out positions 4 to 4")],
)
def test_positions_scored_twice_or_never_are_told(evidence, first, fault):
    events, result = evidence
    event = of(events, protocol.SCORED, protocol.TTT, 1)
    event["tokens"] += event["first"] - first
    event["first"] = first
    found = problems(*rechained(events, result))
    assert found[0] == f"ttt, chunk 1: {fault}"
    assert any("tokens, the result claims 14" in problem for problem in found)


def test_a_chunk_left_out_shows_in_the_numbers(evidence):
    events, result = evidence
    events.remove(of(events, protocol.SCORED, protocol.SLIDING, 1))
    found = problems(*rechained(events, result))
    assert found[:2] == [
        "sliding, chunk 2: it comes as the stage's number 1",
        "sliding, chunk 2: it leaves out positions 4 to 7",
    ]


def test_a_chunk_whose_tokens_are_not_its_positions_is_told(evidence):
    events, result = evidence
    of(events, protocol.SCORED, protocol.TTT, 3)["tokens"] = 3
    assert "ttt, chunk 3: it counts 3 tokens in positions 12 to 13" in problems(*rechained(events, result))


def test_learning_more_than_was_scored_is_told(evidence):
    events, result = evidence
    of(events, protocol.LEARNED, protocol.TTT, 1)["last"] = 9
    assert problems(events, result) == ["ttt, chunk 1: positions 4 to 8 were learned, 4 to 7 scored"]


def test_learning_twice_and_learning_where_nothing_may_is_told(evidence):
    events, result = evidence
    again = of(events, protocol.LEARNED, protocol.TTT, 1)
    elsewhere = {**again, "stage": protocol.SLIDING}
    assert problems([*events, again, elsewhere], result) == [
        "sliding, chunk 1: something learned from it, in a stage that only scores",
        "ttt, chunk 1: it was handed over to be learned twice",
    ]


def test_rounds_of_a_chunk_must_add_up_to_it(evidence):
    events, result = evidence
    for rounds, is_right in (([1.0, 3.4], True), ([1.0, 3.5], False), (["a"], False)):
        chunk = of(events, protocol.SCORED, protocol.TTT, 0)
        chunk["rounds"], chunk["nats"] = rounds, 4.4
        assert any("its rounds add up to" in problem for problem in problems(events, result)) != is_right, rounds


def test_a_stage_without_chunks_or_without_a_score_is_told(evidence):
    events, result = evidence
    sliding = [event for event in events if event["stage"] == protocol.SLIDING]
    assert problems(sliding, result) == ["ttt: no chunk of it was logged as scored"]
    del result.scores[protocol.TTT]
    assert problems(events, result) == ["ttt: chunks were scored, the result has no such score"]
    assert problems(events, dataclasses.replace(result, status=protocol.STOPPED)) == []


@pytest.mark.parametrize(
    ("field", "value"), [("chunk", None), ("first", "0"), ("tokens", 4.0), ("nats", "4"), ("bytes", True)]
)
def test_an_event_without_its_numbers_is_a_problem_and_no_crash(evidence, field, value):
    events, result = evidence
    changed = copy.deepcopy(events)
    of(changed, protocol.SCORED, protocol.TTT, 1)[field] = value
    assert any(f"its scored event lacks a number: {field}" in problem for problem in problems(changed, result))


def test_links_are_what_the_format_says():
    """Written out by hand, for whoever replays a chain with a program of their own."""
    import hashlib

    record = {"stage": "ttt", "chunk": 0, "first": 0, "last": 2, "nats": 0.1, "tokens": 2, "bytes": 5}
    text = '{"bytes":5,"chunk":0,"first":0,"last":2,"nats":0.1,"stage":"ttt","tokens":2}'
    first = hashlib.sha256(("ttt" + ARTIFACT).encode()).hexdigest()
    assert protocol.first_link("ttt", ARTIFACT) == first
    assert protocol.next_link(first, record) == hashlib.sha256((first + text).encode()).hexdigest()
