"""`AdminService` for the control state: converts messages and applies changes; knows no call and no status."""

from __future__ import annotations

from typing import Final, Literal, Protocol

from google.protobuf.duration_pb2 import Duration

from pretrade.admin.v1 import admin_pb2 as pb
from server.control.flags import FLAGS
from server.control.model import TRADING_STATE, Restriction
from server.control.state import ControlState, Wanted
from server.control.subjects import CHAIN, OFF, ON, breaker_subject, drain_subject, flag_subject
from server.errors import InvalidChangeError, UnknownSubjectError
from server.inference.breaker import Mode, State
from server.inference.endpoints import role_of
from server.inference.pool import Role
from server.inference.replica import Replica
from server.inference.replicas import Replicas

_LONGEST_SECONDS: Final = 7 * 86_400
_STATES: Final = {
    State.CLOSED: pb.BREAKER_STATE_CLOSED,
    State.OPEN: pb.BREAKER_STATE_OPEN,
    State.HALF_OPEN: pb.BREAKER_STATE_HALF_OPEN,
}
_MODES: Final = {
    pb.BREAKER_MODE_AUTOMATIC: Mode.AUTOMATIC,
    pb.BREAKER_MODE_FORCED_OPEN: Mode.FORCED_OPEN,
    pb.BREAKER_MODE_FORCED_CLOSED: Mode.FORCED_CLOSED,
    pb.BREAKER_MODE_METRICS_ONLY: Mode.METRICS_ONLY,
}
_MODE_MESSAGES: Final = {mode: message for message, mode in _MODES.items()}
_TRADING_STATES: Final = {
    pb.TRADING_STATE_ACTIVE: "ACTIVE",
    pb.TRADING_STATE_REDUCING: "REDUCING",
    pb.TRADING_STATE_HALTED: "HALTED",
}
_ROLES: Final = {
    "primary": pb.REPLICA_ROLE_PRIMARY,
    "secondary": pb.REPLICA_ROLE_SECONDARY,
    "challenger": pb.REPLICA_ROLE_CHALLENGER,
}


class Asking(Protocol):
    """Fields that every request to change the control state has."""

    @property
    def reason(self) -> str: ...  # noqa: D102
    @property
    def dry_run(self) -> bool: ...  # noqa: D102
    @property
    def expected_control_version(self) -> int: ...  # noqa: D102

    def HasField(self, field_name: Literal["expected_control_version"]) -> bool: ...  # noqa: D102


class Steering:
    """The part of `AdminService` that is about the control state.

    What it raises is a `ControlError`; a change that was asked for with `dry_run` is not made.

    Args:
        control: What is steered.
        replicas: Whose breakers and drains are steered.
    """

    def __init__(self, control: ControlState, replicas: Replicas) -> None:
        self._control = control
        self._replicas = replicas

    def control(self) -> pb.GetControlResponse:
        """Every value that was set, and the restrictions that make up the trading state."""
        control = self._control
        response = pb.GetControlResponse(
            control_version=control.version, trading_state=control.trading_state, status=control.status()
        )
        for subject, setting in sorted(control.settings().items()):
            temporary = setting.temporary
            who = setting if temporary is None else temporary
            try:
                value, default = control.value(subject), control.default(subject)
            except KeyError:
                continue  # of a version that knows more than this one
            message = response.settings.add(
                subject=subject,
                value=value,
                permanent_value=default if setting.permanent is None else setting.permanent,
                author=who.author,
                reason=who.reason,
            )
            if (seconds := control.reverts_in_seconds(subject)) is not None:
                message.expires_in.CopyFrom(duration(seconds))
        response.restrictions.extend(map(self._restriction, control.restrictions()))
        return response

    def _restriction(self, restriction: Restriction) -> pb.Restriction:
        message = pb.Restriction(
            change_id=restriction.id,
            state=pb.TradingState.Value(f"TRADING_STATE_{restriction.level}"),
            author=restriction.author,
            reason=restriction.reason,
        )
        if (seconds := self._control.remaining_seconds(restriction)) is not None:
            (message.begins_in if restriction.begins else message.expires_in).CopyFrom(duration(seconds))
        return message

    def replica_list(self) -> pb.ListReplicasResponse:
        """Every replica."""
        return pb.ListReplicasResponse(replicas=self.replicas(), control_version=self._control.version)

    def replicas(self) -> list[pb.ReplicaStatus]:
        """Every replica, primary first."""
        return [self._one(role, replica) for role in self._replicas.roles for replica in role.replicas]

    async def drain(self, request: pb.DrainReplicaRequest, author: str) -> pb.DrainReplicaResponse:
        """Sends a replica no more orders."""
        subject = drain_subject(self._known(request.replica))
        change = await self._change(request, author, subject, ON, expiry(request))
        return pb.DrainReplicaResponse(replica=self._replica(request.replica), change=change)

    async def resume(self, request: pb.ResumeReplicaRequest, author: str) -> pb.ResumeReplicaResponse:
        """Gives a replica its orders back."""
        change = await self._change(request, author, drain_subject(self._known(request.replica)), OFF)
        return pb.ResumeReplicaResponse(replica=self._replica(request.replica), change=change)

    async def set_breaker(self, request: pb.SetBreakerRequest, author: str) -> pb.SetBreakerResponse:
        """Forces a breaker, or hands it back."""
        subject = breaker_subject(self._known(request.replica))
        mode = _MODES.get(request.mode)
        if mode is None:
            raise InvalidChangeError("mode: must be one of the breaker modes")
        change = await self._change(request, author, subject, mode.value, expiry(request))
        return pb.SetBreakerResponse(replica=self._replica(request.replica), change=change)

    def flag_list(self) -> pb.ListFlagsResponse:
        """Every flag."""
        return pb.ListFlagsResponse(
            flags=self.flags(),
            trading_state=self._control.trading_state,
            control_version=self._control.version,
            provider=self._control.flags.provider_name,
        )

    def flags(self) -> list[pb.Flag]:
        """Every flag."""
        return [self._flag(name) for name in FLAGS]

    async def set_flag(self, request: pb.SetFlagRequest, author: str) -> pb.SetFlagResponse:
        """Sets one flag."""
        if request.name not in FLAGS:
            raise UnknownSubjectError(f"name: one of {', '.join(FLAGS)}")
        value = ON if request.enabled else OFF
        change = await self._change(request, author, flag_subject(request.name), value, expiry(request))
        return pb.SetFlagResponse(flag=self._flag(request.name), change=change)

    async def set_trading_state(self, request: pb.SetTradingStateRequest, author: str) -> pb.SetTradingStateResponse:
        """Sets the trading state."""
        name = _TRADING_STATES.get(request.state)
        if name is None:
            raise InvalidChangeError("state: must be ACTIVE, REDUCING or HALTED")
        change = await self._change(request, author, TRADING_STATE, name, expiry(request), tuple(request.lifts))
        previous = pb.TradingState.Value(f"TRADING_STATE_{change.previous}")
        return pb.SetTradingStateResponse(previous=previous, state=self._control.trading_state, change=change)

    async def set_chain(self, request: pb.SetChainRequest, author: str) -> pb.SetChainResponse:
        """Sets who may answer, in which order."""
        value = ",".join(request.stages) if request.stages else None
        change = await self._change(request, author, CHAIN, value, expiry(request))
        return pb.SetChainResponse(stages=self.chain(), change=change)

    def chain(self) -> list[str]:
        """Stages that may answer, in the order they are asked."""
        return self._control.value(CHAIN).split(",")

    async def _change(
        self,
        request: Asking,
        author: str,
        subject: str,
        value: str | None,
        expires_in_seconds: float | None = None,
        lifts: tuple[str, ...] = (),
    ) -> pb.Change:
        return await change_of(self._control, request, author, subject, value, expires_in_seconds, lifts)

    def _known(self, replica: str) -> str:
        names = self._replicas.names
        if replica not in names:
            raise UnknownSubjectError(f"replica: one of {', '.join(names)}")
        return replica

    def _flag(self, name: str) -> pb.Flag:
        subject = flag_subject(name)
        flag = pb.Flag(
            name=name,
            enabled=self._control.flags.values[name],
            default_enabled=self._control.default(subject) == ON,
            description=FLAGS[name],
        )
        if (seconds := self._control.reverts_in_seconds(subject)) is not None:
            flag.reverts_in.CopyFrom(duration(seconds))
        return flag

    def _replica(self, name: str) -> pb.ReplicaStatus:
        """One replica; of a role with several endpoints only what is said of all of them."""
        found = self._replicas.find(name)
        if found.several:
            modes = {replica.breaker.mode for replica in found.replicas}
            return pb.ReplicaStatus(
                name=name,
                role=_ROLES.get(role_of(name), pb.REPLICA_ROLE_CHALLENGER),
                endpoint=",".join(replica.endpoint for replica in found.replicas),
                breaker_mode=_MODE_MESSAGES[modes.pop()] if len(modes) == 1 else pb.BREAKER_MODE_UNSPECIFIED,
                healthy=any(replica.healthy for replica in found.replicas),
                drained=found.drained,
            )
        role = next(one for one in self._replicas.roles if name in {replica.name for replica in one.replicas})
        return self._one(role, self._replicas[name])

    def _one(self, role: Role, replica: Replica) -> pb.ReplicaStatus:
        name = replica.name
        status = pb.ReplicaStatus(
            name=name,
            role=_ROLES.get(role_of(role.name), pb.REPLICA_ROLE_CHALLENGER),
            endpoint=replica.endpoint,
            breaker_state=_STATES[replica.breaker.state],
            breaker_mode=_MODE_MESSAGES[replica.breaker.mode],
            healthy=replica.healthy,
            model_version=replica.model.version if replica.model else "",
            in_flight=replica.batcher.in_flight,
            abandoned=replica.batcher.abandoned,
            queued=replica.batcher.queued,
            p50=duration(replica.latency.p50),
            p95=duration(replica.latency.p95),
            p99=duration(replica.latency.p99),
            batches=replica.batcher.batches,
            rows=replica.batcher.rows,
            shed=replica.batcher.shed,
            outcomes={outcome.value: count for outcome, count in replica.outcomes.items()},
            drained=replica.drained,
            ejected=replica.ejected,
        )
        names = dict.fromkeys((name, role.name))
        ends = [
            self._control.reverts_in_seconds(subject(of))
            for subject in (breaker_subject, drain_subject)
            for of in names
        ]
        if seconds := [end for end in ends if end is not None]:
            status.reverts_in.CopyFrom(duration(min(seconds)))
        return status


async def change_of(
    control: ControlState,
    request: Asking,
    author: str,
    subject: str,
    value: str | None,
    expires_in_seconds: float | None = None,
    lifts: tuple[str, ...] = (),
    detail: tuple[str, ...] = (),
) -> pb.Change:
    """Makes a change of the control state as a request asks for it; raises what `ControlState.change` does.

    Args:
        control: What is changed.
        request: Why, for which version, and whether only to see what would change.
        author: Who asks.
        subject: What is set.
        value: To what; None for what the settings say.
        expires_in_seconds: When it ends; None for never.
        lifts: See `Wanted`.
        detail: See `Wanted`.
    """
    expected = request.expected_control_version if request.HasField("expected_control_version") else None
    wanted = Wanted(
        subject,
        value,
        author,
        request.reason,
        expires_in_seconds,
        expected_version=expected,
        dry_run=request.dry_run,
        detail=detail,
        lifts=lifts,
    )
    return await control.change(wanted)


def duration(seconds: float) -> Duration:
    """Seconds as a message."""
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


class _Expiring(Protocol):
    @property
    def expires_in(self) -> Duration: ...

    def HasField(self, field_name: Literal["expires_in"]) -> bool: ...


def expiry(request: _Expiring) -> float | None:
    """Seconds until a change ends; None for one without an end. Raises `InvalidChangeError` for none that may be."""
    if not request.HasField("expires_in"):
        return None
    seconds = request.expires_in.seconds + request.expires_in.nanos / 1e9
    if not 0 < seconds <= _LONGEST_SECONDS:
        raise InvalidChangeError("expires_in: must be > 0 and at most 7 days")
    return seconds
