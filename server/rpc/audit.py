"""The edge of `AuditService`. What is read passes through as bytes: the event loop that decides takes nothing apart."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.wire.reading import reading_pb2
from server.audit.reading.reading import Question, Reading
from server.errors import InvalidRequestError, TooManyWatchersError
from server.journal.journal import Journal
from server.journal.lock import FileLock
from server.rpc.call import Call
from server.rpc.events import Event
from server.security.identity import Caller, known_name, longest_name

SERVICE: Final = audit_pb2.DESCRIPTOR.services_by_name["AuditService"].full_name
_MOST_WATCHERS: Final = 16
_WATCH_SECONDS: Final = 0.1
"""How often a watcher that has seen everything looks whether there is more."""
_MAX_NAME: Final = 64


class AuditServicer:
    """Serves `AuditService`, in bytes.

    Args:
        lookups: Answers what people ask.
        watching: Reads the journals for watchers, so that a slow database does not hold them up.
        replays: Runs models.
        explanations: Runs them to explain decisions, also those that callers wait for.
        journal: Makes outcomes durable.
        recording: The lock that the server's processes record outcomes under.
        wall_clock_ns: Nanoseconds since the Unix epoch.
    """

    def __init__(
        self,
        lookups: Reading,
        watching: Reading,
        replays: Reading,
        explanations: Reading,
        journal: Journal,
        recording: FileLock,
        wall_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._lookups = lookups
        self._watching = watching
        self._replays = replays
        self._explanations = explanations
        self._journal = journal
        self._wall_clock_ns = wall_clock_ns
        self.watchers = 0
        """Who watches decisions now, by whatever protocol."""
        self._recording = recording

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service, without parsers: requests and responses are bytes."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "GetDecision": grpc.unary_unary_rpc_method_handler(self._asks(self._lookups, Question.GET)),
            "ListDecisions": grpc.unary_unary_rpc_method_handler(self._asks(self._lookups, Question.LIST)),
            "WatchDecisions": grpc.unary_stream_rpc_method_handler(self._watch),
            "RecordOutcome": grpc.unary_unary_rpc_method_handler(self._record_outcome),
            "ReplayDecision": grpc.unary_unary_rpc_method_handler(self._asks(self._replays, Question.REPLAY)),
            "ExplainDecision": grpc.unary_unary_rpc_method_handler(self._asks(self._explanations, Question.EXPLAIN)),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        server.add_registered_method_handlers(SERVICE, methods)

    async def changes(self, request: bytes) -> bytes:
        """Answers `AdminService.ListChanges`. Raises `AuditError`."""
        return await self._lookups.ask(Question.CHANGES, request)

    def _asks(self, reading: Reading, question: Question) -> Callable[[bytes, Call], Any]:
        async def method(request: bytes, call: Call) -> bytes:
            return await reading.ask(question, request)

        return method

    async def watch_json(self, request: audit_pb2.WatchDecisionsRequest, call: Call) -> AsyncGenerator[Sequence[Event]]:
        """The same as `WatchDecisions`, as JSON, which the process that reads has made already."""
        async with contextlib.aclosing(self._steps(request, call, as_json=True)) as steps:
            async for step in steps:
                yield [Event(cursor, text) for cursor, text in zip(step.cursors, step.events, strict=True)]

    async def _watch(self, request: bytes, call: Call) -> AsyncIterator[bytes]:
        """Sends what the journals hold beyond a cursor, again and again."""
        try:
            wanted = audit_pb2.WatchDecisionsRequest.FromString(request)
        except DecodeError as error:
            raise InvalidRequestError("the request is not a valid message of this method") from error
        async with contextlib.aclosing(self._steps(wanted, call, as_json=False)) as steps:
            async for step in steps:
                for event in step.events:
                    yield event

    async def _steps(
        self, request: audit_pb2.WatchDecisionsRequest, call: Call, *, as_json: bool
    ) -> AsyncGenerator[reading_pb2.NextEventsResponse]:
        """What is new, again and again.

        Nothing is kept for a watcher but its cursor: one that does not read holds up nothing but itself.
        """
        if self.watchers >= _MOST_WATCHERS:
            raise TooManyWatchersError(self.watchers)
        self.watchers += 1
        try:
            wanted = reading_pb2.NextEventsRequest(watch=request, as_json=as_json)
            begun = False
            while True:
                answer = await self._watching.ask(Question.EVENTS, wanted.SerializeToString())
                if not begun:
                    begun = True
                    await call.accept()
                step = reading_pb2.NextEventsResponse.FromString(answer)
                wanted.watch.cursor = step.cursor
                if step.events:
                    yield step
                if not step.more:
                    await asyncio.sleep(_WATCH_SECONDS)
        finally:
            self.watchers -= 1

    async def _record_outcome(self, request: bytes, call: Call) -> bytes:
        """Makes an outcome durable, unless it is known already."""
        outcome = _outcome(request, call.caller)
        # One after the other, so that two different outcomes of one decision do not pass each other.
        async with self._recording.held():
            asked = reading_pb2.FindOutcomeRequest(outcome=outcome)
            answer = await self._lookups.ask(Question.OUTCOME, asked.SerializeToString())
            before = reading_pb2.FindOutcomeResponse.FromString(answer)
            if before.HasField("outcome"):
                return audit_pb2.RecordOutcomeResponse(outcome=before.outcome, existed=True).SerializeToString()
            outcome.recorded_at_ns = self._wall_clock_ns()
            await self._journal.append(packet_pb2.JournalEntry(outcome=outcome).SerializeToString())
        return audit_pb2.RecordOutcomeResponse(outcome=outcome).SerializeToString()


def _outcome(request: bytes, caller: Caller | None) -> packet_pb2.Outcome:
    """The outcome in a request.

    Raises:
        InvalidRequestError: It breaks a rule; names the field and the rule.
    """
    try:
        outcome = audit_pb2.RecordOutcomeRequest.FromString(request).outcome
    except DecodeError as error:
        raise InvalidRequestError("the request is not a valid message of this method") from error
    outcome.ClearField("recorded_at_ns")
    # Whoever is known reports in no other name: an outcome of another reporter would be taken for theirs.
    outcome.reporter = known_name(caller, outcome.reporter)
    longest = longest_name(caller, _MAX_NAME)
    rules = (
        ("decision_id", f"must be 1 to {_MAX_NAME} characters", 0 < len(outcome.decision_id) <= _MAX_NAME),
        ("reporter", f"must be 1 to {longest} printable characters", _is_name(outcome.reporter, longest)),
        ("filled_quantity", "must be finite and >= 0", 0 <= outcome.filled_quantity < math.inf),
        (
            "fill_price",
            "must be finite and > 0, and is there exactly when something was filled",
            0 < outcome.fill_price < math.inf if outcome.filled_quantity > 0 else not outcome.HasField("fill_price"),
        ),
        ("markout_bps", "must be finite", math.isfinite(outcome.markout_bps)),
    )
    for field, rule, kept in rules:
        if not kept:
            raise InvalidRequestError(f"outcome.{field}: {rule}")
    return outcome


def _is_name(text: str, longest: int) -> bool:
    return 0 < len(text) <= longest and text.isprintable()
