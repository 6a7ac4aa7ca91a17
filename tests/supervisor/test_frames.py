"""Frames and the handshake: what is whole is read, however it is cut; all else is a FrameError and nothing else."""

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.supervisor import frames
from jaxscale.supervisor.frames import Bulk, Frame, FrameError, FrameParser, FrameWriter, Kind
from jaxscale.supervisor.handshake import AuthenticationError, ClientHandshake, ServerHandshake
from jaxscale.supervisor.job_token import Token, new_token

KEY = bytes(range(32))
BODIES = st.dictionaries(
    st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.text(max_size=20), max_size=4
)
MESSAGES = st.lists(st.tuples(st.sampled_from(Kind), BODIES, st.binary(max_size=40)), min_size=1, max_size=4)
settings.register_profile("frames", deadline=None, max_examples=100)


def stream(messages, key=KEY):
    writer = FrameWriter()
    if key is not None:
        writer.authenticate(key)
    return b"".join(writer.frame(kind, body, len(bulk)) + bulk for kind, body, bulk in messages)


def parser(key=KEY, bulk_limit=1 << 20):
    made = FrameParser(bulk_limit=bulk_limit)
    if key is not None:
        made.authenticate(key)
    return made


def read(made, pieces):
    """What a parser finds, as (kind, body, bulk bytes)."""
    found = []
    for piece in pieces:
        for item in made.feed(piece):
            if isinstance(item, Frame):
                found.append([item.kind, dict(item.body), b"", item.bulk_nbytes])
            else:
                found[-1][2] += item.data
    return [(kind, body, bulk) for kind, body, bulk, nbytes in found if len(bulk) == nbytes]


def raw(kind=Kind.REQUEST, text=b"{}", bulk=0, magic=frames.MAGIC, version=frames.VERSION, announced=None):
    nbytes = len(text) if announced is None else announced
    return struct.pack("!4sHHIQ", magic, version, kind, nbytes, bulk) + bytes(32) + text


@settings(settings.get_profile("frames"))
@given(MESSAGES, st.data())
def test_cut_anywhere_the_same_is_read(messages, data):
    whole = stream(messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    made = parser()
    assert read(made, pieces) == messages
    made.end()


@settings(settings.get_profile("frames"))
@given(MESSAGES)
def test_reading_exactly_what_is_wanted(messages):
    whole, made, at, found = stream(messages), parser(), 0, []
    while at < len(whole):
        piece = whole[at : at + made.wanted]
        at += len(piece)
        if found and found[-1][1]:
            made.skip_bulk(len(piece))
            found[-1] = (found[-1][0], 0)
        else:
            found += [(item.kind, item.bulk_nbytes) for item in made.feed(piece)]
    assert [kind for kind, _ in found] == [kind for kind, _, _ in messages]
    made.end()


@settings(settings.get_profile("frames"))
@given(MESSAGES, st.data())
def test_a_stream_cut_short_is_an_error_at_its_end(messages, data):
    whole = stream(messages)
    borders = {len(stream(messages[:n])) for n in range(len(messages) + 1)}
    cut = data.draw(st.integers(0, len(whole) - 1).filter(lambda at: at not in borders))
    made = parser()
    assert read(made, [whole[:cut]]) == messages[: len(read(parser(), [whole[:cut]]))]
    with pytest.raises(FrameError, match="in the middle of a frame"):
        made.end()


@settings(settings.get_profile("frames"))
@given(st.lists(st.binary(max_size=200), max_size=5), st.booleans())
def test_random_bytes(pieces, sealed):
    made = parser(KEY if sealed else None)
    try:
        for piece in pieces:
            assert made.feed(piece) == []
    except FrameError:
        with pytest.raises(FrameError, match=r".+"):
            made.feed(b"")


@settings(settings.get_profile("frames"))
@given(st.binary(max_size=300), st.sampled_from(Kind), st.integers(0, 40))
def test_random_json_behind_a_right_header(text, kind, bulk):
    try:
        expected = json.loads(text.decode())
    except (ValueError, RecursionError):
        expected = None
    made = parser(None)
    if isinstance(expected, dict) and "NaN" not in str(text) and "Infinity" not in str(text):
        assert made.feed(raw(kind, text, bulk)) == [Frame(kind, expected, bulk)]
    else:
        with pytest.raises(FrameError):
            made.feed(raw(kind, text, bulk))


@settings(settings.get_profile("frames"))
@given(MESSAGES, st.data())
def test_one_changed_byte_changes_no_message(messages, data):
    """Bulk bytes are not sealed: a change there passes. Everywhere else it is noticed before its frame is believed."""
    whole = bytearray(stream(messages))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    ends = [len(stream(messages[:n])) for n in range(1, len(messages) + 1)]
    hit = next(n for n, end in enumerate(ends) if at < end)
    found = []
    made = parser()
    if at >= ends[hit] - len(messages[hit][2]):
        found = read(made, [bytes(whole)])
        assert [item[:2] for item in found] == [message[:2] for message in messages]
        return
    try:
        for byte in whole:
            found += made.feed(bytes([byte]))
        made.end()
    except FrameError:
        pass
    else:
        pytest.fail("a changed frame was taken")
    assert sum(isinstance(item, Frame) for item in found) == hit


@settings(settings.get_profile("frames"))
@given(MESSAGES, st.data())
def test_a_frame_left_out_repeated_or_of_another_connection(messages, data):
    parts = [stream(messages[: n + 1])[len(stream(messages[:n])) :] for n in range(len(messages))]
    n = data.draw(st.integers(0, len(parts) - 1))
    for changed in (parts[:n] + parts[n + 1 :] + [stream([messages[0]], bytes(32))], [*parts[: n + 1], parts[n]]):
        with pytest.raises(FrameError, match="seal"):
            read(parser(), [b"".join(changed)])
    with pytest.raises(FrameError, match="seal"):
        read(parser(bytes(32)), [b"".join(parts)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n\r\n\r\n", "another protocol"),
        (raw(version=2), "version 2 of the frame protocol, this side version 1"),
        (raw(kind=9), "kind 9 are unknown"),
        (raw(kind=0), "kind 0 are unknown"),
        (raw(announced=frames.JSON_LIMIT + 1, text=b""), "announces 1048577 bytes of JSON; at most 1048576"),
        (raw(announced=(1 << 32) - 1, text=b""), "at most 1048576"),
        (raw(bulk=(1 << 64) - 1), "announces 18446744073709551615 bulk bytes; at most 1048576"),
        (raw(text=b""), "cannot be read"),
        (raw(text=b"[1]"), "is a list; it has to be an object"),
        (raw(text=b"null"), "is a NoneType"),
        (raw(text=b'{"a":NaN}'), "NaN is no JSON"),
        (raw(text=b'{"a":1'), "cannot be read"),
        (raw(text=b'{"a":"\xff"}'), "cannot be read"),
        (raw(text=b"[" * 100_000), "cannot be read"),
        (raw(text=b'{"a":' + b"9" * 5000 + b"}"), "cannot be read"),
    ],
)
def test_what_is_refused(data, reason):
    with pytest.raises(FrameError, match=reason):
        parser(None).feed(data)


def test_limits_are_the_callers():
    made = FrameParser(bulk_limit=10, json_limit=20)
    assert made.feed(raw(bulk=10)) == [Frame(Kind.REQUEST, {}, 10)]
    assert made.feed(bytes(10)) == [Bulk(bytes(10))]
    with pytest.raises(FrameError, match="11 bulk bytes; at most 10"):
        made.feed(raw(bulk=11))
    with pytest.raises(FrameError, match="21 bytes of JSON; at most 20"):
        FrameParser(json_limit=20).feed(raw(text=b" " * 21))


def test_a_parser_holds_no_more_than_one_header_and_json():
    made = parser(None, bulk_limit=1 << 40)
    made.feed(raw(bulk=1 << 40))
    for _ in range(64):
        made.feed(bytes(1 << 16))
    assert len(made._buffer) == 0
    made = parser(None)
    made.feed(raw(announced=1000, text=b" " * 999))
    assert made.wanted == 1


def test_what_a_writer_refuses():
    with pytest.raises(FrameError, match="above the limit"):
        FrameWriter().frame(Kind.REPLY, {"a": "x" * frames.JSON_LIMIT})
    with pytest.raises(ValueError, match="Out of range"):
        FrameWriter().frame(Kind.REPLY, {"a": float("nan")})


def frame_of(data):
    (found,) = FrameParser().feed(data)
    return found


def shaken(client_token, server_token, jobs=("job", "job")):
    client = ClientHandshake(jobs[0], client_token, "host-0", "agent")
    server = ServerHandshake(jobs[1], server_token)
    challenge = server.challenge(frame_of(client.hello()))
    proof, session = client.prove(frame_of(challenge))
    return session, server.check(frame_of(proof))


def test_both_ends_know_the_same_after_the_handshake():
    token = new_token()
    ours, theirs = shaken(token, token)
    assert ours == theirs
    assert (ours.name, ours.role) == ("host-0", "agent")
    again, _ = shaken(token, token)
    assert len({ours.client_key, ours.server_key, again.client_key, again.server_key}) == 4


def test_a_server_without_the_token_is_found_out_by_the_client():
    with pytest.raises(AuthenticationError, match="server could not prove"):
        shaken(new_token(), new_token())


def test_a_client_without_the_token_is_found_out_by_the_server():
    token = new_token()
    client = ClientHandshake("job", Token(bytes(32)), "host-0", "agent")
    server = ServerHandshake("job", token)
    challenge = frame_of(server.challenge(frame_of(client.hello())))
    for proof in (bytes(32).hex(), challenge.body["proof"]):  # the server's own proof, sent back, is none
        forged = ServerHandshake("job", token)
        forged.challenge(frame_of(client.hello()))
        with pytest.raises(AuthenticationError, match=r"agent 'host-0' could not prove"):
            forged.check(Frame(Kind.PROOF, {"proof": proof}))
    with pytest.raises(AuthenticationError, match="could not prove"):
        server.check(Frame(Kind.PROOF, {"proof": challenge.body["proof"]}))
    with pytest.raises(FrameError, match="before a HELLO"):
        server.check(Frame(Kind.PROOF, {"proof": challenge.body["proof"]}))


def test_a_recorded_proof_is_worthless_on_another_connection():
    token = new_token()
    client, server = ClientHandshake("job", token, "host-0", "agent"), ServerHandshake("job", token)
    hello = frame_of(client.hello())
    proof, _ = client.prove(frame_of(server.challenge(hello)))
    server.check(frame_of(proof))
    again = ServerHandshake("job", token)
    again.challenge(hello)
    with pytest.raises(AuthenticationError, match="could not prove"):
        again.check(frame_of(proof))


def test_the_name_and_role_are_part_of_the_proof():
    token = new_token()
    client, server = ClientHandshake("job", token, "host-0", "worker"), ServerHandshake("job", token)
    hello = frame_of(client.hello())
    challenge = server.challenge(Frame(Kind.HELLO, {**hello.body, "role": "agent"}))
    with pytest.raises(AuthenticationError):
        client.prove(frame_of(challenge))


def test_another_job_is_refused():
    token = new_token()
    with pytest.raises(AuthenticationError, match="belongs to job 'one'; this is job 'two'"):
        shaken(token, token, ("one", "two"))


@pytest.mark.parametrize("field", ["job", "name", "role", "nonce"])
@pytest.mark.parametrize("value", [None, 3, "", "x" * 2000, "\ud800", [], {}, "ü"])
def test_hellos_that_are_none(field, value):
    hello = frame_of(ClientHandshake("job", new_token(), "host-0", "agent").hello())
    with pytest.raises((FrameError, AuthenticationError)):
        ServerHandshake("job", new_token()).challenge(Frame(Kind.HELLO, {**hello.body, field: value}))


@settings(settings.get_profile("frames"))
@given(st.sampled_from(Kind), BODIES)
def test_handshakes_of_random_frames(kind, body):
    frame = Frame(kind, body)
    with pytest.raises(FrameError):
        ServerHandshake("job", Token(KEY)).challenge(frame)
    with pytest.raises(FrameError):
        ClientHandshake("job", Token(KEY), "host-0", "agent").prove(frame)


def test_an_unsealed_refusal_is_only_taken_before_the_first_sealed_frame():
    refusal = FrameWriter().frame(Kind.REFUSAL, {"code": 401, "reason": "no"})
    assert read(parser(), [refusal])[0][0] is Kind.REFUSAL
    with pytest.raises(FrameError, match="seal"):
        read(parser(), [stream([(Kind.WELCOME, {}, b"")]) + refusal])
    with pytest.raises(FrameError, match="seal"):
        read(parser(), [FrameWriter().frame(Kind.REPLY, {})])
