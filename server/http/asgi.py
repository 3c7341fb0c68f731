"""A call as ASGI hands it over, on either edge; and what becomes of its answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import quote, unquote_to_bytes

import structlog

from server.errors import DeadlineError, InternalError, PretradeError
from server.rpc.call import Call
from server.rpc.framing import PEER, Header
from server.security.identity import Attempt

if TYPE_CHECKING:
    from server.decision.metrics import DecisionMetrics

_log = structlog.get_logger(__name__)

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = Sequence[Header]

CLIENT_CERTIFICATE: Final = b"x-forwarded-client-cert"
"""Header in which the transport passes on a caller's certificate. Envoy removes it if a client sends it; so do we."""
_LONGEST_WAIT_SECONDS: Final = 10.0
_LONGEST_ZOMBIE_SECONDS: Final = 0.2
_CERTIFICATE: Final = re.compile(rb'(?:^|;)Cert="([^"]*)"')


class CallerGoneError(Exception):
    """The caller has gone: an answer cannot be sent."""


class AsgiCall(Call):
    """A call that came by ASGI.

    Args:
        receive: Gives its requests.
        headers: Its metadata, pseudo headers and all, as bytes.
        arrived: When it was taken up, in monotonic seconds.
    """

    __slots__ = ("_task", "arrived", "ended", "is_patient", "is_unary", "is_watched", "receive")

    def __init__(self, receive: Receive, headers: Headers, arrived: float) -> None:
        super().__init__(None, headers)
        self._task = asyncio.current_task()
        self.receive = receive
        self.arrived = arrived
        self.is_unary = True
        self.is_patient = True
        """It came without a deadline. A call that came too late has none either, and is none of these."""
        self.is_watched = False
        """True while its requests are read and its answer is not: then anybody may ask `receive`."""
        self.ended: PretradeError | CallerGoneError | None = None
        """Why it was cancelled."""

    def end(self, reason: PretradeError | CallerGoneError) -> None:
        """Cancels it; the first reason counts."""
        assert self._task is not None
        if self.ended is None:
            self.ended = reason
            self._task.cancel()


class Delivery(Protocol):
    """Who wants to know what became of unary answers. A servicer knows that of a stream's: it is asked for the next."""

    def sent(self, answer: object) -> None:
        """The transport has all of an answer."""
        ...

    def not_sent(self, answer: object) -> None:
        """The caller did not wait for an answer."""
        ...


class Lateness:
    """Knows when the callers of one port stop waiting, by what their calls' headers say.

    Args:
        metrics: Counts the calls that came too late.
        clock: Monotonic seconds.
        wall_clock: Seconds of the clock by which Envoy says when a call arrived.
        expired: Told of every call that was taken up too late, and how many seconds its caller had allowed.
    """

    def __init__(
        self,
        metrics: DecisionMetrics,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        expired: Callable[[float], None],
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self._expired = expired

    async def set_deadline(self, call: AsgiCall, allowed: float | None, arrived: float | None) -> None:
        """Sets a call's deadline, if it has one; raises where it has passed.

        A call that waited that long stays counted in Envoy's gate for the same time again, at no cost. If it ended at
        once, the gate would take it for a quick answer and let in thousands more calls that are too late already. Each
        of those would take time from a call that is not.

        Args:
            call: Which one.
            allowed: Seconds that its caller allows; None for any.
            arrived: When it came, in seconds of the wall clock; None if unknown.
        """
        if allowed is None:
            return
        call.is_patient = False
        waited = self._waited(arrived)
        if waited < allowed:
            call.deadline = call.arrived - waited + allowed
            return
        self._expired(allowed)
        await asyncio.sleep(min(waited, _LONGEST_ZOMBIE_SECONDS))
        self._metrics.late += 1
        raise DeadlineError("DEADLINE_EXPIRED", "the deadline had passed on arrival")

    def _waited(self, arrived: float | None) -> float:
        """How long a call waited to be taken up, in seconds.

        Envoy tells by the wall clock, which may step meanwhile: longer than anybody waits is not true.
        """
        if arrived is None:
            return 0.0
        waited = self._wall_clock() - arrived
        return waited if 0.0 < waited < _LONGEST_WAIT_SECONDS else 0.0


def deadline_passed() -> DeadlineError:
    """Why a call ends whose deadline has passed while it was answered."""
    return DeadlineError("DEADLINE_EXCEEDED", "Deadline Exceeded")


def failed(path: str, error: Exception) -> InternalError:
    """The error that the caller gets for an internal fault."""
    _log.error("call failed", method=path[:200], exc_info=error)
    return InternalError("the call failed; see the server's log")


def header(headers: Headers, wanted: bytes) -> bytes:
    """A header's value; empty without."""
    for name, value in headers:
        if name == wanted:
            return value
    return b""


def attempt_of(method: str, headers: Headers) -> Attempt:
    """What a call shows of itself before its request is read.

    Args:
        method: `/package.Service/Method`.
        headers: As the transport gives them. Peer and certificate are what the transport says of them.
    """
    return Attempt(
        method=method,
        authorization=header(headers, b"authorization").decode("latin-1"),
        # The scope's client is the address in `x-forwarded-for`, and only the beginning of an IPv6 address.
        peer=lambda: header(headers, PEER).decode("latin-1") or "unknown",
        certificate=lambda: _certificate(header(headers, CLIENT_CERTIFICATE)),
    )


def forwarded_certificate(pem: str) -> Header:
    """The header in which a caller's certificate is passed on."""
    return CLIENT_CERTIFICATE, b'Cert="%s"' % quote(pem, safe="").encode()


def _certificate(forwarded: bytes) -> bytes | None:
    """The client's certificate in PEM, as the transport forwards it."""
    found = _CERTIFICATE.search(forwarded)
    return None if found is None else unquote_to_bytes(found[1])
