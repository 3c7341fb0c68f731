"""What is answered: a decision, in the words of Python. Each reads the message of the contract when it is asked."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb

_TRADE: Final = pb.ACTION_TRADE
"""By itself, since reading it from the module takes as long as reading the decision."""


class Decision:
    """The answer to one order. A degraded answer is a decision like any other: see `source` and `degradations`.

    Args:
        message: The decision as the contract has it.
        server: Address of the server that answered.
        explanation: Why the model scored as it did, where that was asked for.
    """

    __slots__ = ("explanation", "message", "server")

    def __init__(self, message: pb.Decision, server: str, explanation: pb.Explanation | None = None) -> None:
        self.message = message
        """The decision as the contract has it, with everything that this class has no name for."""
        self.server = server
        """Which of the client's servers answered: `HOST:PORT`."""
        self.explanation = explanation
        """What each feature added to the score; None where it was not asked for."""

    @property
    def trades(self) -> bool:
        """Whether the order should trade. False for an answer that this version of the library does not know."""
        return self.message.action == _TRADE

    @property
    def abstains(self) -> bool:
        """Whether there is no answer to rely on: treat it as you would treat a model that is down."""
        return self.message.action == pb.ACTION_ABSTAIN

    @property
    def action(self) -> str:
        """`TRADE`, `NO_TRADE` or `ABSTAIN`."""
        return _name(pb.Action, self.message.action)

    @property
    def score(self) -> float | None:
        """Calibrated probability in [0, 1] that the order is eligible; None when no model answered."""
        message = self.message
        return message.score if message.HasField("score") else None

    @property
    def threshold(self) -> float | None:
        """What the score was compared with, in [0, 1]; None when no model answered."""
        return self.message.threshold if self.message.HasField("threshold") else None

    @property
    def source(self) -> str:
        """Who answered: `PRIMARY`, `SECONDARY`, `EMBEDDED`, `CANARY`, `CACHED_SCORE`, `RULES` or `NONE`."""
        return _name(pb.Source, self.message.source)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the action is what it is, for example `SCORE_BELOW_THRESHOLD`; at least one."""
        return tuple(_name(pb.ReasonCode, reason) for reason in self.message.reasons)

    @property
    def degradations(self) -> tuple[str, ...]:
        """What went wrong on the way, for example `PRIMARY_TIMEOUT`; empty for a clean decision."""
        return tuple(_name(pb.Degradation, one) for one in self.message.degradations)

    @property
    def decision_id(self) -> str:
        """Its id in the audit, a UUIDv7."""
        return self.message.decision_id

    @property
    def order_ref(self) -> str:
        """The order's own reference."""
        return self.message.order_ref

    @property
    def model_name(self) -> str:
        """Name of the model that scored; empty when none did."""
        return self.message.model_name

    @property
    def model_version(self) -> str:
        """Version of that model; empty when none scored."""
        return self.message.model_version

    @property
    def feature_age_seconds(self) -> float | None:
        """How old the features were, in seconds; None without features, or with the caller's own."""
        return self.message.feature_age.ToNanoseconds() / 1e9 if self.message.HasField("feature_age") else None

    @property
    def used_seconds(self) -> float:
        """What the decision took on the server, in seconds."""
        return self.message.budget.used_us / 1e6

    @property
    def decided_at(self) -> datetime:
        """When the server decided, in UTC."""
        return self.message.decided_at.ToDatetime(tzinfo=UTC)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decision) and self.message == other.message

    def __hash__(self) -> int:
        return hash(self.message.decision_id)

    def __repr__(self) -> str:
        score = "" if self.score is None else f", score={self.score:.4f}"
        return (
            f"Decision({self.action}{score}, source={self.source}, reasons={list(self.reasons)}, "
            f"decision_id={self.decision_id!r})"
        )


def _name(enum: Any, value: int) -> str:
    """The name of an enum's value; of one that a newer server sent, its number."""
    try:
        return enum_name(enum, value)
    except ValueError:
        return str(value)
