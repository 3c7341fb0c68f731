"""The role that each method requires. A method that is not listed requires `admin`."""

from __future__ import annotations

from typing import Final

from server.security.identity import Role

_ADMIN: Final = "/pretrade.admin.v1.AdminService/"
_AUDIT: Final = "/pretrade.audit.v1.AuditService/"
_DECISION: Final = "/pretrade.decision.v1.DecisionService/"
HEALTH: Final = "/grpc.health.v1.Health/"
"""Of everybody."""

_ANY_ROLE: Final = frozenset(Role)
_READS: Final = frozenset({Role.VIEWER})
_STEERS: Final = frozenset({Role.OPERATOR})
_DEPLOYS: Final = frozenset({Role.ADMIN})

ROLES: Final = {
    f"{_DECISION}Decide": frozenset({Role.TRADER}),
    f"{_DECISION}DecideBatch": frozenset({Role.TRADER}),
    f"{_DECISION}DecideStream": frozenset({Role.TRADER}),
    f"{_ADMIN}GetStatus": _READS,
    f"{_ADMIN}GetCaller": _ANY_ROLE,
    f"{_ADMIN}GetControl": _READS,
    f"{_ADMIN}ListChanges": _READS,
    f"{_ADMIN}ListReplicas": _READS,
    f"{_ADMIN}ListFlags": _READS,
    f"{_ADMIN}GetCanary": _READS,
    f"{_ADMIN}ListModels": _READS,
    f"{_ADMIN}GetModelCard": _READS,
    f"{_ADMIN}GetModelMap": _READS,
    f"{_ADMIN}ListAlertRules": _READS,
    f"{_ADMIN}ListSignals": _READS,
    f"{_ADMIN}WatchFeatures": _READS,
    f"{_ADMIN}ListBars": _READS,
    f"{_ADMIN}GetBook": _READS,
    # What on-call does at 3 a.m.; of a canary only what ends it.
    f"{_ADMIN}DrainReplica": _STEERS,
    f"{_ADMIN}ResumeReplica": _STEERS,
    f"{_ADMIN}SetBreaker": _STEERS,
    f"{_ADMIN}SetFlag": _STEERS,
    f"{_ADMIN}SetTradingState": _STEERS,
    f"{_ADMIN}SetAlertRule": _STEERS,
    f"{_ADMIN}DeleteAlertRule": _STEERS,
    f"{_ADMIN}AbortCanary": _STEERS,
    f"{_ADMIN}RollBack": _STEERS,
    # What changes who decides.
    f"{_ADMIN}SetChain": _DEPLOYS,
    f"{_ADMIN}SetModelMap": _DEPLOYS,
    f"{_ADMIN}ReloadConfiguration": _DEPLOYS,
    f"{_ADMIN}StartCanary": _DEPLOYS,
    f"{_ADMIN}SetCanaryWeight": _DEPLOYS,
    f"{_ADMIN}PromoteCanary": _DEPLOYS,
    f"{_ADMIN}LoadModel": _DEPLOYS,
    f"{_ADMIN}SetModelAlias": _DEPLOYS,
    f"{_AUDIT}GetDecision": _READS,
    f"{_AUDIT}ListDecisions": _READS,
    f"{_AUDIT}WatchDecisions": _READS,
    f"{_AUDIT}ReplayDecision": _READS,
    f"{_AUDIT}ExplainDecision": _READS,
    f"{_AUDIT}RecordOutcome": frozenset({Role.TRADER, Role.OPERATOR}),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANY_ROLE,
}
"""By full method: the roles of which a caller needs one."""

OF_SIBLINGS: Final = frozenset({f"{_ADMIN}GetStatus"})
"""What the processes of one server ask each other, on a socket of their machine."""


def allowed(held: frozenset[Role]) -> list[str]:
    """The methods that a caller with these roles may call, sorted."""
    return sorted(method for method, wanted in ROLES.items() if wanted & held)


def roles(method: str) -> frozenset[Role]:
    """The roles of which a caller of this method needs one."""
    return ROLES.get(method, _DEPLOYS)
