"""One HTTP/2 connection against a server that `h2` plays, without a network: whatever it sends, in whatever pieces."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any, cast

import grpc
import grpc.aio
import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import hpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.inference.http2_connection import MOST_ANSWER_BYTES, Connection, Kind, UnusableError

HEAD = b"\x83\x86\x84\x01\x04here\x00\x02te\x08trailers"  # POST, http, /, :authority
OK = [(":status", "200"), ("content-type", "application/grpc")]


class Wire:
    """A connection's transport, and the server at its other end."""

    def __init__(self) -> None:
        self.ended: list[Connection] = []
        self.closed = False
        self.unread = 0
        self.writes = 0
        config = h2.config.H2Configuration(
            client_side=False, validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.h2 = h2.connection.H2Connection(config)
        self.events: list[h2.events.Event] = []
        self.connection = Connection(asyncio.get_running_loop().time, self.ended.append)
        self.connection.connection_made(cast("asyncio.Transport", self))
        self.h2.initiate_connection()

    # What the connection asks of its transport.

    def write(self, data: bytes) -> None:
        self.writes += 1
        if not self.closed:
            self.events += self.h2.receive_data(data)

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return self.unread

    def abort(self) -> None:
        self.closed = True

    # What the server does.

    def flush(self) -> None:
        sent = self.h2.data_to_send()
        if sent:
            self.connection.data_received(sent)

    def ping(self) -> None:
        self.h2.ping(b"12345678")
        self.flush()

    def answer(self, stream: int, message: bytes, *, status: str = "0", said: str = "") -> None:
        """Not sent before `flush`."""
        self.h2.send_headers(stream, OK)
        body = b"\0" + len(message).to_bytes(4, "big") + message
        for at in range(0, len(body), 16_384):
            self.h2.send_data(stream, body[at : at + 16_384])
        self.h2.send_headers(stream, [("grpc-status", status), ("grpc-message", said)], end_stream=True)

    def seen(self, kind: type[h2.events.Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def opened() -> Wire:
    wire = Wire()
    wire.flush()
    assert wire.connection.usable
    return wire


def failed(answer: asyncio.Future[bytes]) -> tuple[grpc.StatusCode, str]:
    error = answer.exception()
    assert isinstance(error, grpc.aio.AioRpcError)
    return error.code(), error.details() or ""


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


async def test_a_call_is_what_a_server_expects_of_grpc() -> None:
    wire = opened()
    wire.connection.begin(HEAD, b"rows")
    (request,) = wire.seen(h2.events.RequestReceived)
    assert (b"te", b"trailers") in [tuple(header) for header in request.headers]
    assert b"".join(event.data for event in wire.seen(h2.events.DataReceived)) == b"\0\0\0\0\x04rows"
    assert len(wire.seen(h2.events.StreamEnded)) == 1


@given(
    message=st.binary(max_size=40_000), cuts=st.lists(st.integers(0, 45_000), max_size=12), other=st.binary(max_size=50)
)
def test_answers_are_the_same_in_whatever_pieces_they_come(message: bytes, cuts: list[int], other: bytes) -> None:
    async def check() -> None:
        wire = opened()
        first, answer = wire.connection.begin(HEAD, b"rows")
        second, of_other = wire.connection.begin(HEAD, b"others")
        wire.answer(second, other)
        wire.answer(first, message)
        whole = wire.h2.data_to_send()
        edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
        for begin, end in itertools.pairwise(edges):
            assert not (answer.done() and end < len(whole)), "before all of it was there"
            wire.connection.data_received(whole[begin:end])
        assert (answer.result(), of_other.result()) == (message, other)

    asyncio.run(check())


@given(cut=st.integers(0, 200), garbage=st.binary(max_size=300))
@example(cut=200, garbage=b"\0")  # another way to write that the last header is empty
def test_no_part_of_an_answer_and_no_garbage_is_ever_an_answer(cut: int, garbage: bytes) -> None:
    async def check() -> None:
        wire = opened()
        stream, answer = wire.connection.begin(HEAD, b"rows")
        wire.answer(stream, b"scores" * 20)
        whole = wire.h2.data_to_send()
        wire.connection.data_received(whole[: min(cut, len(whole) - 1)])
        wire.connection.data_received(garbage)
        wire.connection.connection_lost(None)
        if not answer.exception():  # all scores were there, and the garbage happens to end the answer as it should
            assert cut >= whole.index(b"scores" * 20) + len(b"scores" * 20)
            assert answer.result() == b"scores" * 20
        assert wire.ended

    asyncio.run(check())


@given(garbage=st.binary(max_size=500), with_settings=st.booleans())
def test_garbage_raises_nothing_out_of_the_connection(garbage: bytes, with_settings: bool) -> None:
    async def check() -> None:
        wire = Wire()
        if with_settings:
            wire.flush()
        wire.connection.data_received(garbage)
        with contextlib.suppress(UnusableError):
            wire.connection.begin(HEAD, b"rows")
        wire.connection.connection_lost(None)
        assert not wire.connection.usable
        assert not wire.connection.under_way

    asyncio.run(check())


@pytest.mark.parametrize(
    ("code", "said", "expected"),
    [
        ("14", "Prediction failed%0Aand more", (grpc.StatusCode.UNAVAILABLE, "Prediction failed\nand more")),
        ("13", "", (grpc.StatusCode.INTERNAL, "")),
        ("99", "odd", (grpc.StatusCode.UNKNOWN, "odd")),
        ("no number", "odd", (grpc.StatusCode.UNKNOWN, "odd")),
    ],
)
@pytest.mark.parametrize("trailers_only", [False, True])
async def test_a_status_is_the_calls_error(
    code: str, said: str, expected: tuple[grpc.StatusCode, str], trailers_only: bool
) -> None:
    wire = opened()
    stream, answer = wire.connection.begin(HEAD, b"rows")
    if trailers_only:
        wire.h2.send_headers(stream, [*OK, ("grpc-status", code), ("grpc-message", said)], end_stream=True)
    else:
        wire.answer(stream, b"half", status=code, said=said)
    wire.flush()
    assert failed(answer) == expected
    assert wire.connection.usable


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([(":status", "503")], grpc.StatusCode.UNAVAILABLE),
        ([(":status", "404"), ("content-type", "text/html")], grpc.StatusCode.UNIMPLEMENTED),
        ([(":status", "200"), ("content-type", "text/html")], grpc.StatusCode.UNKNOWN),
        (OK, grpc.StatusCode.UNKNOWN),
    ],
)
async def test_an_answer_without_a_grpc_status_is_an_error(
    headers: list[tuple[str, str]], code: grpc.StatusCode
) -> None:
    wire = opened()
    stream, answer = wire.connection.begin(HEAD, b"rows")
    wire.h2.send_headers(stream, headers, end_stream=True)
    wire.flush()
    assert failed(answer)[0] is code


@pytest.mark.parametrize("body", [b"", b"\0", b"\0\0\0\0\x05four", b"\0\0\0\0\x03four", b"\x01\0\0\0\x04four"])
async def test_status_ok_with_anything_but_one_whole_plain_message_is_an_error(body: bytes) -> None:
    wire = opened()
    stream, answer = wire.connection.begin(HEAD, b"rows")
    wire.h2.send_headers(stream, OK)
    wire.h2.send_data(stream, body)
    wire.h2.send_headers(stream, [("grpc-status", "0")], end_stream=True)
    wire.flush()
    assert failed(answer)[0] is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (h2.errors.ErrorCodes.REFUSED_STREAM, grpc.StatusCode.UNAVAILABLE),
        (h2.errors.ErrorCodes.CANCEL, grpc.StatusCode.CANCELLED),
        (h2.errors.ErrorCodes.INTERNAL_ERROR, grpc.StatusCode.INTERNAL),
    ],
)
async def test_a_reset_ends_its_call_and_no_other(error: h2.errors.ErrorCodes, code: grpc.StatusCode) -> None:
    wire = opened()
    stream, answer = wire.connection.begin(HEAD, b"rows")
    other, of_other = wire.connection.begin(HEAD, b"rows")
    wire.h2.send_headers(stream, OK)
    wire.h2.reset_stream(stream, error)
    wire.answer(other, b"scores")
    wire.flush()
    assert failed(answer)[0] is code
    assert of_other.result() == b"scores"


async def test_an_answer_that_is_too_large_is_given_up_and_costs_no_more() -> None:
    wire = opened()
    stream, answer = wire.connection.begin(HEAD, b"rows")
    wire.answer(stream, bytes(MOST_ANSWER_BYTES + 20_000))
    wire.flush()
    code, said = failed(answer)
    assert (code, "larger than max" in said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    assert wire.connection.usable
    largest, of_largest = wire.connection.begin(HEAD, b"rows")
    wire.answer(largest, bytes(MOST_ANSWER_BYTES))
    wire.flush()
    assert len(of_largest.result()) == MOST_ANSWER_BYTES


async def test_many_answers_are_read_however_much_they_are_together() -> None:
    wire = opened()
    for _ in range(60):
        stream, answer = wire.connection.begin(HEAD, b"rows")
        wire.answer(stream, bytes(MOST_ANSWER_BYTES))
        wire.flush()
        assert len(answer.result()) == MOST_ANSWER_BYTES
    assert wire.seen(h2.events.WindowUpdated)


async def test_a_farewell_ends_what_was_not_taken_up_and_lets_the_rest_finish() -> None:
    wire = opened()
    taken, answer = wire.connection.begin(HEAD, b"rows")
    _, refused = wire.connection.begin(HEAD, b"rows")
    payload = taken.to_bytes(4, "big") + bytes(4) + b"moving"
    wire.connection.data_received(frame(Kind.GOAWAY, 0, 0, payload))
    assert failed(refused)[0] is grpc.StatusCode.UNAVAILABLE
    assert wire.connection.leaving.done()
    with pytest.raises(UnusableError):
        wire.connection.begin(HEAD, b"rows")
    wire.connection.end_when_done()
    assert not wire.closed
    wire.answer(taken, b"scores")
    wire.flush()
    assert answer.result() == b"scores"
    assert wire.closed


async def test_a_message_that_no_window_has_room_for_is_not_sent() -> None:
    wire = opened()
    _, answer = wire.connection.begin(HEAD, bytes(60_000))
    with pytest.raises(UnusableError):
        wire.connection.begin(HEAD, bytes(60_000))
    wire.h2.increment_flow_control_window(60_000)
    wire.flush()
    wire.connection.begin(HEAD, bytes(60_000))
    with pytest.raises(UnusableError):
        wire.connection.begin(HEAD, bytes(70_000))  # no stream has so large a window
    assert not answer.done()
    wire.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})
    wire.h2.increment_flow_control_window(1 << 20)
    wire.flush()
    wire.connection.begin(HEAD, bytes(500_000))
    assert sum(len(event.data) for event in wire.seen(h2.events.DataReceived)) == 620_000 + 3 * 5


async def test_no_more_calls_are_under_way_than_the_server_wants() -> None:
    wire = Wire()
    wire.h2.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 1})
    wire.flush()
    stream, _ = wire.connection.begin(HEAD, b"rows")
    with pytest.raises(UnusableError):
        wire.connection.begin(HEAD, b"rows")
    wire.answer(stream, b"scores")
    wire.flush()
    wire.connection.begin(HEAD, b"rows")


async def test_padding_priorities_and_headers_in_pieces_are_understood() -> None:
    wire = opened()
    stream, answer = wire.connection.begin(HEAD, b"rows")
    block = b"\x88\x0f\x10\x10application/grpc"  # :status 200, content-type
    padded = bytes((3,)) + bytes(5) + block[:4] + bytes(3)
    wire.connection.data_received(frame(Kind.HEADERS, 0x8 | 0x20, stream, padded))
    wire.connection.data_received(frame(Kind.CONTINUATION, 0x4, stream, block[4:]))
    wire.connection.data_received(frame(Kind.DATA, 0x8, stream, b"\x02" + b"\0\0\0\0\x06scores" + b"\0\0"))
    wire.connection.data_received(frame(0xEE, 0, stream, b"of a kind that nobody knows"))
    wire.connection.data_received(frame(Kind.HEADERS, 0x5, stream, b"\x00\x0bgrpc-status\x010"))
    assert answer.result() == b"scores"


async def test_pings_and_settings_are_answered() -> None:
    wire = opened()
    assert wire.seen(h2.events.SettingsAcknowledged)
    wire.ping()
    await asyncio.sleep(0.006)
    assert len(wire.seen(h2.events.PingAckReceived)) == 1


async def test_the_answer_to_a_ping_goes_with_the_next_call_and_once() -> None:
    wire = opened()
    wire.ping()
    writes = wire.writes
    wire.connection.begin(HEAD, b"rows")
    assert wire.writes == writes + 1
    assert [event.ping_data for event in wire.seen(h2.events.PingAckReceived)] == [b"12345678"]
    await asyncio.sleep(1)
    assert len(wire.seen(h2.events.PingAckReceived)) == 1
    wire.ping()
    await asyncio.sleep(0.006)
    assert len(wire.seen(h2.events.PingAckReceived)) == 2


async def test_a_flood_of_pings_is_answered_before_it_has_grown_large() -> None:
    wire = opened()
    for _ in range(100):
        wire.ping()
    assert 50 < len(wire.seen(h2.events.PingAckReceived)) < 100
    await asyncio.sleep(0.006)
    assert len(wire.seen(h2.events.PingAckReceived)) == 100


async def test_a_connection_that_ends_answers_no_ping() -> None:
    wire = opened()
    wire.ping()
    wire.connection.abort("enough")
    wire.closed = False
    await asyncio.sleep(1)
    assert not wire.seen(h2.events.PingAckReceived)


async def test_the_same_bytes_say_something_else_once_the_table_has_changed() -> None:
    wire = opened()

    def answered(headers: bytes, trailers: bytes) -> asyncio.Future[bytes]:
        stream, answer = wire.connection.begin(HEAD, b"rows")
        wire.connection.data_received(frame(Kind.HEADERS, 0x4, stream, headers))
        wire.connection.data_received(frame(Kind.DATA, 0, stream, b"\0\0\0\0\x06scores"))
        wire.connection.data_received(frame(Kind.HEADERS, 0x5, stream, trailers))
        return answer

    newest, before, third = b"\xbe", b"\xbf", b"\xc0"  # of the table
    status_200, new = b"\x88", b"\x40"
    assert answered(status_200 + b"\x5f\x10application/grpc", new + b"\x0bgrpc-status\x010").result() == b"scores"
    assert answered(status_200 + before, newest).result() == b"scores"
    assert failed(answered(status_200 + before, new + b"\x0bgrpc-status\x0214"))[0] is grpc.StatusCode.UNAVAILABLE
    assert failed(answered(status_200 + third, newest))[0] is grpc.StatusCode.UNAVAILABLE
    assert answered(status_200 + third, before).result() == b"scores"


async def test_headers_of_which_the_table_has_all_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    decode = hpack.Decoder.decode

    def counted(self: hpack.Decoder, data: bytes, raw: bool = False) -> Any:
        if data != HEAD:  # that is the server's
            decoded.append(data)
        return decode(self, data, raw)

    monkeypatch.setattr(hpack.Decoder, "decode", counted)
    wire = opened()
    for _ in range(10):
        stream, answer = wire.connection.begin(HEAD, b"rows")
        wire.answer(stream, b"scores")
        wire.flush()
        assert answer.result() == b"scores"
    assert len(decoded) <= 4, "the first two, and the first two that are known"


@pytest.mark.parametrize(
    "sent",
    [
        frame(Kind.DATA, 0, 0, b"x"),
        frame(Kind.DATA, 0x8, 1, b"\x09x"),
        frame(Kind.DATA, 0, 77, b"x"),
        frame(Kind.HEADERS, 0x4, 2, b"\x88"),
        frame(Kind.HEADERS, 0x4, 1, b"\xff\xff\xff\xff\xff\xff"),
        frame(Kind.HEADERS, 0, 1, b"\x88") + frame(Kind.DATA, 0, 1, b"x"),
        frame(Kind.HEADERS, 0, 1, b"\x88") + 5 * frame(Kind.CONTINUATION, 0, 1, bytes(16_384)),
        frame(Kind.CONTINUATION, 0x4, 1, b"\x88"),
        frame(Kind.RST_STREAM, 0, 1, b"x"),
        frame(Kind.SETTINGS, 0, 0, b"x"),
        frame(Kind.SETTINGS, 0, 0, b"\0\x04\xff\xff\xff\xff"),
        frame(Kind.SETTINGS, 0, 0, b"\0\x05\0\0\0\x01"),
        frame(Kind.PUSH_PROMISE, 0x4, 1, bytes(8)),
        frame(Kind.PING, 0, 0, b"x"),
        frame(Kind.GOAWAY, 0, 0, b"x"),
        frame(Kind.WINDOW_UPDATE, 0, 0, b"x"),
        2 * frame(Kind.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"),
        b"\xff\xff\xff" + frame(Kind.DATA, 0, 1, b"x")[3:],
    ],
    ids=range(18),
)
async def test_a_peer_that_breaks_the_protocol_is_left_and_its_calls_end(sent: bytes) -> None:
    wire = opened()
    _, answer = wire.connection.begin(HEAD, b"rows")
    wire.connection.data_received(sent)
    assert failed(answer)[0] is grpc.StatusCode.UNAVAILABLE
    assert wire.connection.is_broken
    assert wire.closed
    assert wire.ended


async def test_a_peer_that_reads_nothing_is_left() -> None:
    wire = opened()
    wire.unread = 5 << 20
    wire.ping()
    await asyncio.sleep(0.006)
    assert wire.closed
    assert wire.connection.is_broken


async def test_a_peer_that_swallows_everything_is_pinged_and_left() -> None:
    wire = opened()
    _, answer = wire.connection.begin(HEAD, b"rows")
    await asyncio.sleep(1.1)
    assert len(wire.seen(h2.events.PingReceived)) == 1
    assert wire.connection.usable
    await asyncio.sleep(0.5)
    assert wire.closed
    assert failed(answer)[0] is grpc.StatusCode.UNAVAILABLE
    assert not wire.connection.is_broken


async def test_a_slow_peer_that_answers_pings_is_not_left_and_an_idle_one_is_not_pinged() -> None:
    wire = opened()
    stream, answer = wire.connection.begin(HEAD, b"rows")
    for _ in range(40):
        await asyncio.sleep(0.1)
        wire.flush()  # pings are answered
    assert len(wire.seen(h2.events.PingReceived)) >= 3
    wire.answer(stream, b"scores")
    wire.flush()
    assert answer.result() == b"scores"
    pings = len(wire.seen(h2.events.PingReceived))
    await asyncio.sleep(60)
    assert len(wire.seen(h2.events.PingReceived)) == pings
    assert wire.connection.usable


async def test_a_call_that_is_given_up_or_cancelled_is_reset_and_its_late_answer_means_nothing() -> None:
    wire = opened()
    late, answer = wire.connection.begin(HEAD, b"rows")
    left, cancelled = wire.connection.begin(HEAD, b"rows")
    wire.connection.give_up(late)
    cancelled.cancel()
    wire.connection.cancel(left)
    assert failed(answer)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert {event.stream_id for event in wire.seen(h2.events.StreamReset)} == {late, left}
    sent = b"\x88\x0f\x10\x10application/grpc"
    for stream in (late, left):
        wire.connection.data_received(frame(Kind.HEADERS, 0x4, stream, sent))
        wire.connection.data_received(frame(Kind.DATA, 0, stream, b"\0\0\0\0\x06scores"))
        wire.connection.data_received(frame(Kind.HEADERS, 0x5, stream, b"\x00\x0bgrpc-status\x010"))
    assert wire.connection.usable
    after, of_after = wire.connection.begin(HEAD, b"rows")
    wire.answer(after, b"scores")
    wire.flush()
    assert of_after.result() == b"scores"
