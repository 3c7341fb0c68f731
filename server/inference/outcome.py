"""The possible outcomes of a call to a model server, by meaning rather than by status code.

TorchServe answers "queue full", "no worker" and "unknown model" all as INTERNAL. It answers an exception of the handler
as UNAVAILABLE, which is also the code of a broken connection. Only the message distinguishes them.
"""

from __future__ import annotations

import enum
from typing import Final

import grpc


class Outcome(enum.Enum):
    """Class of one call's outcome."""

    __hash__ = object.__hash__
    """A member equals only itself; outcomes are counted for every order, and `Enum` hashes names, in Python."""

    SUCCESS = "success"
    OVERLOAD = "overload"
    """The replica, or our queue for it, is full: another replica may do better; not the replica's fault."""
    MODEL_ERROR = "model_error"
    """The model or its worker failed."""
    BAD_ANSWER = "bad_answer"
    """Answered, but with a score that must not be used: NaN, out of range, wrong shape or wrong version."""
    TRANSPORT = "transport"
    """The call did not reach the replica, or its answer did not come back."""
    TIMEOUT = "timeout"
    """No answer in time; it may still come and is then ignored."""
    IGNORED = "ignored"
    """Says nothing about the replica: we gave the call up ourselves."""


BLAMES_CONTENT: Final = frozenset((Outcome.MODEL_ERROR, Outcome.BAD_ANSWER))
"""Failures that one row of a batch can cause."""


class BatchFailedError(Exception):
    """A batch got no usable answer.

    Attributes:
        outcome: Why.
    """

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(f"{outcome.value}: {detail}")
        self.outcome = outcome


_BY_MESSAGE: Final = (
    # Queue full and no worker alike; both are refused at once.
    ("has no worker to serve", Outcome.OVERLOAD),
    ("worker died", Outcome.MODEL_ERROR),
    # The handler raised or returned what cannot be sent; the code is UNAVAILABLE.
    ("prediction failed", Outcome.MODEL_ERROR),
    ("invalid model predict output", Outcome.MODEL_ERROR),
    ("number of batch response mismatched", Outcome.MODEL_ERROR),
    ("unsupported model output data type", Outcome.MODEL_ERROR),
    # Triton's full queue and a model that is loading or was unloaded; the code is UNAVAILABLE. By its documentation.
    ("exceeds maximum queue size", Outcome.OVERLOAD),
    ("model is not available", Outcome.MODEL_ERROR),
    ("unknown model", Outcome.MODEL_ERROR),
    # What a server in Python, MLServer for one, says when its model raised; the code is UNKNOWN.
    ("unexpected <class", Outcome.MODEL_ERROR),
    # Our own end's words for an answer beyond its limit; the code is RESOURCE_EXHAUSTED.
    ("received message larger than max", Outcome.BAD_ANSWER),
)

_BY_CODE: Final = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: Outcome.OVERLOAD,
    grpc.StatusCode.DEADLINE_EXCEEDED: Outcome.TIMEOUT,
    grpc.StatusCode.UNAVAILABLE: Outcome.TRANSPORT,
    # Not asked for by us when it arrives in time: TorchServe resets the stream of a request that is too large.
    grpc.StatusCode.CANCELLED: Outcome.TRANSPORT,
    grpc.StatusCode.UNKNOWN: Outcome.TRANSPORT,
}
"""Every other code is a model error, INVALID_ARGUMENT too: our rows are of one length, so the model wants another."""


_CUT: Final = "stream removed"
"""Our own end's words for a call that ended without a status from the other; INTERNAL when it was a RST_STREAM."""


def classify(code: grpc.StatusCode, details: str, *, is_over: bool = False) -> Outcome:
    """The class of a failed call, from the first line of its message (TorchServe 0.12's and others'), else its code.

    Args:
        code: As the client has it.
        details: The message.
        is_over: The call's time is up. The server knows until when its client waits and resets the call then, which may
            be heard before the client's own timer.
    """
    message = details.partition("\n")[0].lower()
    if code is grpc.StatusCode.CANCELLED and is_over:
        return Outcome.TIMEOUT
    if code is grpc.StatusCode.INTERNAL and message.startswith(_CUT):
        return Outcome.TRANSPORT
    for words, outcome in _BY_MESSAGE:
        if words in message:
            return outcome
    return _BY_CODE.get(code, Outcome.MODEL_ERROR)
