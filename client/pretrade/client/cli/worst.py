"""What is wrong with a server, by its status, the worst first, and where the runbook says what to do."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Final, NamedTuple

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.client.enum_names import enum_name

_CHAMPIONS: Final = (pb.REPLICA_ROLE_PRIMARY, pb.REPLICA_ROLE_SECONDARY)
_MANY_UNSHIPPED: Final = 10_000
"""Journal entries that wait for SQL, from which on the alert ShipperBehind counts them."""
_MANY_RECORDS: Final = 10_000
"""Records that a feature worker has yet to read, from which on the alert WorkerBehind counts them."""
_COMPONENTS: Final = {
    "audit_store": "ShipperFailing",
    "decisions_topic": "ShipperFailing",
    "embedded": "EmbeddedRefused",
    "explanations": "ReaderEnding",
    "certificates": "CredentialsNotReplaced",
    "token_keys": "CredentialsNotReplaced",
    "access_policy": "CredentialsNotReplaced",
    "tracing": "TracesLost",
}
"""The sections about components that no other fault here names."""
_TOLD: Final = ("journal", "control", "feature_cache")
"""Components whose faults are told by their effect, as those of replicas are."""


class Fault(NamedTuple):
    """Something that is wrong."""

    what: str
    """A sentence for people."""
    section: str
    """The section of `docs/runbook.md` about it, by its title."""

    @property
    def anchor(self) -> str:
        """Where that section is."""
        return f"docs/runbook.md#{self.section.lower()}"


def faults(status: pb.GetStatusResponse) -> list[Fault]:
    """All that is wrong, the worst first: what stops every order, what stops some, what may stop them next."""
    return [
        *_journal(status),
        *_halted(status),
        *_not_ready(status),
        *_features(status),
        *_champions(status),
        *_sets(status),
        *_expired(status),
        *_processes(status),
        *_control(status),
        *_shipping(status),
        *_reducing(status),
        *_components(status),
        *_steered(status),
        *_challengers(status),
        *_workers(status),
    ]


def _journal(status: pb.GetStatusResponse) -> Iterator[Fault]:
    if not status.audit.writable:
        error = status.audit.last_error
        section = "JournalFull" if "not shipped fill" in error else "JournalUnwritable"
        yield Fault(f"the audit journal takes no rows, so every answer is ABSTAIN: {error or 'not known why'}", section)


def _halted(status: pb.GetStatusResponse) -> Iterator[Fault]:
    if status.trading_state == pb.TRADING_STATE_HALTED:
        yield Fault("trading is HALTED: every answer is NO_TRADE", "TradingHalted")


def _reducing(status: pb.GetStatusResponse) -> Iterator[Fault]:
    if status.trading_state == pb.TRADING_STATE_REDUCING:
        yield Fault("trading is REDUCING: only reduce-only orders may trade", "TradingHalted")


def _not_ready(status: pb.GetStatusResponse) -> Iterator[Fault]:
    if not status.ready and status.audit.writable:
        yield Fault("the server is not ready: it is starting or stopping, and takes no orders", "ServerDown")


def _features(status: pb.GetStatusResponse) -> Iterator[Fault]:
    unusable = [one for one in status.features if not one.usable]
    if not unusable:
        return
    problems = {one.name: one.detail for one in status.components if not one.healthy}
    if problems.get("feature_cache", "").startswith("Redis"):
        yield Fault("Redis is not connected, so that features go stale and orders get ABSTAIN", "RedisLost")
        return
    every = len(unusable) == len(status.features)
    which = "every instrument" if every and len(unusable) > 1 else ", ".join(one.instrument for one in unusable)
    why = ", ".join(sorted({one.problem for one in unusable}))
    if all(_is_behind(one) for one in unusable):
        most = max(one.lag_records for one in unusable)
        what = f"the feature worker is {most:,} records behind; {which}: {why}, so that orders get ABSTAIN"
        yield Fault(what, "WorkerBehind")
    elif every and not any(one.worker for one in unusable):
        yield Fault(f"no feature worker reports; {which}: {why}, so that orders get ABSTAIN", "WorkerDown")
    else:
        section = "BookUnknown" if why == "book unknown" else "FeaturesStale"
        yield Fault(f"{which}: {why}, so that orders get ABSTAIN", section)


def _sets(status: pb.GetStatusResponse) -> Iterator[Fault]:
    """Computed features that a model needs besides those of `mf1`, where these are there."""
    usable = {one.instrument for one in status.features if one.usable}
    for one in status.feature_sets:
        lacking = [each for each in one.computed if not each.usable and each.instrument in usable]
        if lacking:
            which = ", ".join(each.instrument for each in lacking)
            why = ", ".join(sorted({each.problem for each in lacking}))
            of = ", ".join(one.models)
            yield Fault(
                f"features of {one.feature_set} for {which}: {why}, so that model {of} is not asked",
                "FeaturesOfSetMissing",
            )


def _champions(status: pb.GetStatusResponse) -> Iterator[Fault]:
    by_model: dict[str, list[pb.ReplicaStatus]] = {}
    for one in status.replicas:
        if one.role in _CHAMPIONS:
            by_model.setdefault(_model_of(one), []).append(one)
    for name, champions in by_model.items():
        model = next((one for one in status.models if one.name == name), None) if name else None
        if model is not None and not model.champion_version:
            if _gets_orders(status, name):
                what = f"model {name} has no champion, and the model map gives it orders: rules or no source answer"
                yield Fault(what, "BothChampionsBroken")
            continue
        yield from _champions_of(status, champions, status.embedded if model is None else model.embedded)


def _champions_of(
    status: pb.GetStatusResponse, champions: list[pb.ReplicaStatus], embedded: pb.EmbeddedStatus
) -> Iterator[Fault]:
    """What is wrong with the champion's replicas of one model."""
    out = {one.name: why for one in champions if (why := _out(one))}
    if len(out) == len(champions) > 1:
        by_embedded = bool(embedded.model_version) and not embedded.problem and _on(status, "embedded")
        rest = "the embedded model answers instead" if by_embedded else "cached scores, rules or no source answer"
        dead = not any(one.healthy or _is_steered(one) for one in champions)
        what = f"neither {' nor '.join(out)} answers" if dead else " and ".join(out.values())
        yield Fault(f"{what}; {rest}", "BothChampionsBroken")
        return
    for one in champions:
        if one.name in out:
            others = ", ".join(other.name for other in champions if other.name not in out)
            flaps = one.healthy and not _is_steered(one) and not one.ejected
            section = "BreakerFlapping" if flaps else "ReplicaDown"
            yield Fault(f"{out[one.name]}; {others or 'nothing'} answers instead", section)


def _gets_orders(status: pb.GetStatusResponse, name: str) -> bool:
    """Whether a rule of the model map comes to a model before one that fits every order."""
    for rule in status.model_map:
        if rule.model == name:
            return True
        if set(rule.instrument + rule.strategy) <= {"*"}:
            return False
    return name == "default"


def _model_of(replica: pb.ReplicaStatus) -> str:
    """The model that a replica serves, by its name: `scalper` for `scalper/primary`, nothing for the default one."""
    return replica.name.rpartition("/")[0]


def _out(replica: pb.ReplicaStatus) -> str:
    """Why a replica gets no orders, or answers none; empty when it does."""
    if replica.drained:
        return f"{replica.name} is drained by an operator"
    if replica.breaker_mode == pb.BREAKER_MODE_FORCED_OPEN:
        return f"{replica.name} is held FORCED_OPEN by an operator"
    if not replica.healthy:
        return f"{replica.name} does not answer"
    if replica.breaker_mode == pb.BREAKER_MODE_AUTOMATIC and replica.breaker_state != pb.BREAKER_STATE_CLOSED:
        return f"the breaker of {replica.name} is {enum_name(pb.BreakerState, replica.breaker_state)}"
    if replica.ejected:
        return f"{replica.name} {replica.ejected}"
    return ""


def _is_steered(replica: pb.ReplicaStatus) -> bool:
    return replica.drained or replica.breaker_mode != pb.BREAKER_MODE_AUTOMATIC


def _on(status: pb.GetStatusResponse, flag: str) -> bool:
    return any(one.enabled for one in status.flags if one.name == flag)


def _expired(status: pb.GetStatusResponse) -> Iterator[Fault]:
    champion = status.champion
    if _is_past(champion) and _gets_orders(status, "default"):
        yield Fault(f"model {champion.model_version[:8]} has expired, so that orders get ABSTAIN", "ModelExpired")
    for one in status.models:
        if one.name != "default" and _is_past(one) and _gets_orders(status, one.name):
            what = f"model {one.champion_version[:8]} of {one.name} has expired, so that its orders get ABSTAIN"
            yield Fault(what, "ModelExpired")


def _is_past(model: pb.ChampionStatus | pb.NamedModel) -> bool:
    """Whether a model may not decide any more."""
    return model.HasField("expires_in") and model.expires_in.ToTimedelta() <= dt.timedelta()


def _processes(status: pb.GetStatusResponse) -> Iterator[Fault]:
    missing = status.process_count - len(status.processes)
    silent = [one for one in status.processes if one.problem]
    if status.process_count > 1 and (missing > 0 or silent):
        yield Fault(
            f"{max(missing, 0) + len(silent)} of {status.process_count} processes do not answer", "ServerProcessDying"
        )


def _control(status: pb.GetStatusResponse) -> Iterator[Fault]:
    if status.control.stale:
        yield Fault("Redis is not heard: changes do not reach the other servers, nor theirs this one", "ControlStale")
    elif status.control.problem:
        yield Fault(f"the control state: {status.control.problem}", "ControlUnwritten")


def _shipping(status: pb.GetStatusResponse) -> Iterator[Fault]:
    if status.audit.unshipped > _MANY_UNSHIPPED:
        yield Fault(f"{status.audit.unshipped:,} journal entries wait for SQL", "ShipperBehind")


def _components(status: pb.GetStatusResponse) -> Iterator[Fault]:
    idle = {model.name for model in status.models if not model.champion_version}
    told = {*_TOLD, *(replica.name for replica in status.replicas), *map(_role_name, status.replicas)}
    for one in status.components:
        without_champion = one.name.removesuffix("/embedded") in idle
        if not one.healthy and one.name not in told and not without_champion:
            section = _COMPONENTS.get(one.name.rpartition("/")[2], "ServerDown")
            yield Fault(f"{one.name}: {one.detail}", "CertificateExpiring" if "expires" in one.detail else section)


def _role_name(replica: pb.ReplicaStatus) -> str:
    """The component that tells of the replica: that of its role."""
    model, role = _model_of(replica), enum_name(pb.ReplicaRole, replica.role).lower()
    return f"{model}/{role}" if model else role


def _steered(status: pb.GetStatusResponse) -> Iterator[Fault]:
    for one in status.replicas:
        if _is_steered(one) and not _out(one):
            mode = enum_name(pb.BreakerMode, one.breaker_mode)
            yield Fault(f"the breaker of {one.name} is held {mode} by an operator", "BreakerFlapping")


def _challengers(status: pb.GetStatusResponse) -> Iterator[Fault]:
    for one in status.replicas:
        at_rest = bool(_model_of(one)) and not one.healthy and not one.model_version  # until its model has a canary
        if one.role not in _CHAMPIONS and not at_rest and (why := _out(one)):
            yield Fault(f"{why}; no order waits for it", "ReplicaDown")


def _workers(status: pb.GetStatusResponse) -> Iterator[Fault]:
    behind = [one for one in status.features if one.usable and _is_behind(one)]
    if behind:
        most = max(behind, key=lambda one: one.lag_records)
        yield Fault(f"the feature worker is {most.lag_records:,} records behind on {most.instrument}", "WorkerBehind")


def _is_behind(feature: pb.FeatureStatus) -> bool:
    return feature.lag_records > _MANY_RECORDS
