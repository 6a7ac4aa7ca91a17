"""What is known of a fault survives the wire, refuses what is foreign, and is recognised when it happens again."""

import dataclasses
import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.supervisor import evidence as evidences
from jaxscale.supervisor.evidence import (
    KINDS,
    SECTIONS,
    EvidenceError,
    HostLost,
    PhaseExpired,
    WorkerError,
    WorkerExit,
    fingerprint,
    from_json,
    sentence,
    to_json,
)
from jaxscale.train.protocols import Section

TEXT = st.text(max_size=40)
VALUES = {
    str: TEXT,
    int: st.integers(0, 1 << 40),
    float: st.floats(0, 1e9),
    bool: st.booleans(),
    tuple[str, ...]: st.lists(TEXT, max_size=3).map(tuple),
}


@st.composite
def any_evidence(draw):
    kind = draw(st.sampled_from(list(KINDS.values())))
    hints = typing.get_type_hints(kind)
    values = {f.name: draw(VALUES[hints[f.name]]) for f in dataclasses.fields(kind) if hints[f.name] in VALUES}
    if "section" in values:
        values["section"] = draw(st.sampled_from(SECTIONS))
    if "exit_code" in hints:
        values |= draw(st.sampled_from([{"exit_code": 1}, {"signal": 9}]))
    return kind(**values)


@given(any_evidence())
def test_evidence_survives_json(evidence):
    assert from_json(json.loads(json.dumps(to_json(evidence)))) == evidence
    assert sentence(evidence)
    assert fingerprint(evidence) == fingerprint(from_json(to_json(evidence)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=4),
)


@given(any_evidence(), st.data())
def test_a_changed_field_is_refused_or_read_never_a_crash(evidence, data):
    changed = to_json(evidence)
    name = data.draw(st.sampled_from(sorted(changed)) | TEXT)
    changed[name] = data.draw(JSON)
    try:
        read = from_json(changed)
    except EvidenceError:
        return
    # What was let in has the types that the code relies on.
    json.dumps(to_json(read), allow_nan=False)
    assert from_json(to_json(read)) == read


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "a JSON object with a 'kind'"),
        ({"kind": "gossip"}, "unknown kind of evidence 'gossip'; known are worker_exit"),
        ({"kind": "host_lost", "host": "host-0"}, "host_lost lacks epoch, seconds"),
        ({"kind": "host_lost", "host": "a", "epoch": 1, "seconds": 2.0, "mood": 1}, "no field 'mood'"),
        ({"kind": "host_lost", "host": "a", "epoch": True, "seconds": 2.0}, "host_lost.epoch is int, not True"),
        ({"kind": "host_lost", "host": "a", "epoch": 1, "seconds": float("nan")}, "seconds is float, not nan"),
        ({"kind": "worker_exit", "host": "a", "rank": 0, "epoch": 1}, "either an exit_code or a signal"),
        (
            {"kind": "worker_exit", "host": "a", "rank": 0, "epoch": 1, "signal": 9, "section": "nap"},
            "section is one of start",
        ),
        ({"kind": "phase_expired", "epoch": 1, "state": "FORMING", "seconds": 1, "missing": "host-0"}, "list of names"),
    ],
)
def test_what_is_refused_says_why(data, message):
    with pytest.raises(EvidenceError) as error:
        from_json(data)
    assert message in str(error.value)


def test_sections_are_those_of_the_loop():
    assert set(SECTIONS) == {"start", *typing.get_args(Section)}


def test_long_texts_keep_their_end():
    error = WorkerError("host-0", 0, 1, "ValueError", "no", traceback="x" * 100_000 + "ValueError: no")
    sent = to_json(error)
    assert len(sent["traceback"]) == evidences.TEXT_LIMIT
    assert sent["traceback"].endswith("ValueError: no")
    assert len(from_json(dict(sent, traceback=error.traceback)).traceback) == evidences.TEXT_LIMIT


def test_the_same_failure_has_one_fingerprint():
    text = "bad value {} at row {} of /home/{}/data/corpus.bin, took {} s"
    one = WorkerError("host-0", 0, 1, "ValueError", text.format("0x7f3a", 12, "ada", 0.5), section="step", step=50)
    two = WorkerExit(
        "host-3", 3, 2, 1, None, "ValueError", text.format("0xcab01", 977, "bob", 1.25), section="step", step=50
    )
    assert fingerprint(one) == fingerprint(two)
    assert fingerprint(one) != fingerprint(dataclasses.replace(one, step=51))
    assert fingerprint(one) != fingerprint(dataclasses.replace(one, error_class="KeyError"))
    assert fingerprint(one) != fingerprint(dataclasses.replace(one, section="data"))
    assert fingerprint(one) != fingerprint(dataclasses.replace(one, error_text="something else"))


def test_a_signal_is_recognised_behind_a_shell():
    assert WorkerExit("a", 0, 1, exit_code=137).ended_by == 9
    assert WorkerExit("a", 0, 1, signal=11).ended_by == 11
    assert WorkerExit("a", 0, 1, exit_code=1).ended_by is None
    assert WorkerExit("a", 0, 1, exit_code=128).ended_by is None
    assert fingerprint(WorkerExit("a", 0, 1, exit_code=139)) == fingerprint(WorkerExit("b", 1, 2, signal=11))


def test_sentences_name_host_and_place():
    killed = WorkerExit("host-2", 2, 1, signal=9, section="step", step=7)
    assert sentence(killed) == "worker of host-2 was ended by SIGKILL in step after 7 updates"
    assert sentence(HostLost("host-1", 1, 2.04)) == "host-1 is lost: no heartbeat for 2.0 s"
    late = PhaseExpired(3, "FORMING", 20.0, ("host-1", "host-2"))
    assert sentence(late) == "FORMING took longer than 20.0 s; missing: host-1, host-2"
