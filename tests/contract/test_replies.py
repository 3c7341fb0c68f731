"""What the audit says of a reply is what its caller heard: unary, batch and stream, whoever speaks HTTP/2."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Final

import grpc
import h2.errors
import psutil
import pytest
from support.harness import eventually
from support.server_group import WAYS_IN, Group, order, server_group, way_in
from support.wire import STREAM, Caller, framed

from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from server.journal.entries import entry_of, singly
from server.journal.journal_file import JournalReader, journals_of
from server.journal.reply_status import REPLIED, unconfirmed_status

pytestmark = pytest.mark.stack

BATCH: Final = "/pretrade.decision.v1.DecisionService/DecideBatch"
_SECONDS: Final = 5.0
_STEP_SECONDS: Final = 0.003
_MANY: Final = 1_024
_UNREAD: Final = {"grpcio": (256, 2_000), "envoy": (400, 80 * 1024)}
"""Orders that are decided on a stream that is not read, and what the transport takes of their answers, in bytes: its
window and one answer more, or Envoy's 64 KiB and what it takes at once. The others wait, 256 at most."""


@pytest.fixture(scope="module", params=WAYS_IN)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    directory = tmp_path_factory.mktemp("replies")
    # No order is refused because the machine is slow: what is tested here is what is said of those that are decided.
    roomy = {"PRETRADE_ADMISSION__MIN_IN_FLIGHT": "512"}
    with server_group(directory, 1, **way_in(request.param), **roomy) as group:
        yield group


def statuses(group: Group, prefix: str) -> dict[str, str]:
    """What the journal says of the replies to orders whose reference begins so, by reference."""
    (path,) = journals_of(group.directory / "journal.db")
    refs: dict[str, str] = {}
    found: dict[str, str] = {}
    with closing(JournalReader(path)) as journal:
        for row in journal.rows_after(journal.anchor().position, -1):
            for entry in singly(entry_of(row.entry)):
                ref = entry.decision.order.order_ref
                if ref.startswith(prefix):
                    refs[entry.decision.decision.decision_id] = ref
                    found[ref] = REPLIED
                elif (note := entry.reply_unconfirmed).decision_id in refs:
                    found[refs[note.decision_id]] = unconfirmed_status(note.cause)
    return found


@contextmanager
def in_steps(group: Group) -> Iterator[Callable[[], None]]:
    """Stops the server, which then runs for a moment whenever it is told to: to look at what it does, however fast."""
    (pid,) = group.pids()
    server = psutil.Process(pid)

    def step() -> None:
        server.resume()
        threading.Event().wait(_STEP_SECONDS)
        server.suspend()

    server.suspend()
    try:
        yield step
    finally:
        server.resume()


def answers(body: bytes) -> list[pb.OrderResult]:
    """The results of a stream that arrived whole."""
    found = []
    while len(body) >= 5:
        (length,) = struct.unpack_from(">xI", body)
        if len(body) < 5 + length:
            break
        found.append(pb.DecideStreamResponse.FromString(body[5 : 5 + length]).result)
        body = body[5 + length :]
    return found


@pytest.mark.fault(
    "E5", "A caller leaves while its batch is decided", "The audit marks these decisions as not received."
)
def test_a_batch_whose_caller_leaves_while_it_is_decided_was_heard_by_nobody(group: Group) -> None:
    for attempt in range(20):
        found = _left_early(group, f"left-{attempt}-")
        if len(found) < _MANY:
            break  # else the server had decided all of it before it could know
    assert len(found) < _MANY, "who has left needs no further decisions"
    assert REPLIED not in found.values()


def _left_early(group: Group, prefix: str) -> dict[str, str]:
    """What is said of a batch whose caller leaves at the first decisions: nothing was heard, or all of it."""
    request = pb.DecideBatchRequest(orders=[order(f"{prefix}{number}") for number in range(_MANY)])
    with Caller(group.decision) as caller:
        stream = caller.begin(BATCH)
        with in_steps(group) as step:
            caller.send(stream, framed(request.SerializeToString()), end=True)
            eventually(step, lambda _: len(statuses(group, prefix)) > 0)
            caller.http.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
            caller.flush()

        def is_said(found: dict[str, str]) -> bool:
            return REPLIED not in found.values() or list(found.values()).count(REPLIED) == _MANY

        return eventually(lambda: statuses(group, prefix), is_said)


@pytest.mark.fault(
    "E5", "A caller stops reading a stream", "The audit says of each decision whether it was handed to the transport."
)
def test_a_stream_that_ends_unread_was_heard_as_far_as_the_transport_took_it(group: Group) -> None:
    decided, most_bytes = _UNREAD[group.env["PRETRADE_GRPC__EDGE"]]
    with Caller(group.decision, window=1_000) as caller:
        # Nothing is acknowledged: what a thousand bytes hold arrives, and no more.
        caller.http.acknowledge_received_data = lambda *_: None  # type: ignore[method-assign]
        stream = caller.begin(STREAM)
        messages = [pb.DecideStreamRequest(order=order(f"unread-{number}-" + "x" * 48)) for number in range(500)]
        caller.send(stream, b"".join(framed(message.SerializeToString()) for message in messages))
        eventually(lambda: len(statuses(group, "unread-")), lambda rows: rows >= decided)
        caller.read(lambda: len(caller.replies[stream].body) == 1_000)
        caller.http.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        caller.flush()
        arrived = answers(caller.replies[stream].body)
        assert arrived
        taken = most_bytes // min(answer.ByteSize() for answer in arrived)
        assert taken < decided
        found = eventually(
            lambda: statuses(group, "unread-"), lambda found: list(found.values()).count(REPLIED) <= taken
        )
    assert {found[answer.order_ref] for answer in arrived} == {REPLIED}


def test_what_was_answered_was_replied(group: Group) -> None:
    with grpc.insecure_channel(group.decision) as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        stub.Decide(pb.DecideRequest(order=order("told-unary")), timeout=_SECONDS)
        stub.Decide(pb.DecideRequest(order=order("told-why"), explain=True), timeout=_SECONDS)
        batch = pb.DecideBatchRequest(orders=[order(f"told-batch-{number}") for number in range(200)])
        results = list(stub.DecideBatch(batch, timeout=_SECONDS).results)
        streamed = [pb.DecideStreamRequest(order=order(f"told-stream-{number}")) for number in range(200)]
        results += [answer.result for answer in stub.DecideStream(iter(streamed), timeout=_SECONDS)]
    assert len(results) == 400
    # A busy machine's admission may refuse some of them.
    told = {result.order_ref for result in results if result.HasField("decision")} | {"told-unary", "told-why"}
    assert len(told) > 200
    assert statuses(group, "told-") == dict.fromkeys(told, REPLIED)
