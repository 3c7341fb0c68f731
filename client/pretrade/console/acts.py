"""What can be changed from the console: the request that each act makes of a form, and what it may do to trading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.client.cli.changing import risk_without
from pretrade.client.cli.model_versions import LOAD_SECONDS
from pretrade.client.cli.options import span_seconds
from pretrade.client.enum_names import enum_choices, enum_name
from pretrade.console.forms import Form, FormError, choice, needed
from pretrade.console.rules import delete_request, set_request

STAGES: Final = ("model", "embedded", "cached_score", "rules")
"""Those of the fallback chain that may be asked, in the order of the settings' default."""
MODES: Final[Mapping[str, str]] = {
    "automatic": "automatic, by the outcomes of calls",
    "forced_open": "forced open: it gets no orders",
    "forced_closed": "forced closed: it gets every order",
    "metrics_only": "metrics only: every call passes",
}
_STRICTNESS: Final = (pb.TRADING_STATE_ACTIVE, pb.TRADING_STATE_REDUCING, pb.TRADING_STATE_HALTED)
_LONGEST_REASON: Final = 256
CHANGE_SECONDS: Final = 10.0
"""How long a change may take: one that must reach all servers takes two seconds of the server's own patience."""
ALIASES: Final = ("champion", "challenger", "previous")
"""Those that can be set."""
_MODELS: Final = "/models"
_ALERTS: Final = "/alerts"


@dataclass(frozen=True, slots=True)
class Known:
    """What a page knows of the server when it offers an act."""

    status: pb.GetStatusResponse
    control: pb.GetControlResponse


@dataclass(frozen=True, slots=True)
class Act:
    """One thing that can be changed."""

    name: str
    """In paths."""
    title: str
    method: str
    """Of `AdminService`."""
    request: Callable[[Form], Any]
    """The request, without author, reason and the like. Raises `FormError`."""
    risk: Callable[[Form, Known], str] = lambda _form, _known: ""
    """What it may do to trading, in a sentence; empty for nothing to speak of."""
    can_end: bool = True
    """Whether it may be made for a limited time."""
    seconds: float = CHANGE_SECONDS
    """How long it may take."""
    leads_to: str = "/"
    """The page that shows what became of it."""
    chooses_version: bool = False
    """Whether it is about a model version that the form has to name."""

    def complete(self, form: Form, author: str) -> Any:
        """The whole request, but for the version that it expects and whether it is a dry run.

        Raises:
            FormError: A field cannot be understood.
        """
        request = self.request(form)
        request.author = author
        request.reason = form.get("reason", "").strip()
        if len(request.reason) > _LONGEST_REASON:
            raise FormError(f"Why: at most {_LONGEST_REASON} characters.")
        if self.can_end and (text := form.get("span", "").strip()):
            seconds = span_seconds(text)
            if not seconds:
                raise FormError("For how long: a number with its unit, like 90s, 10m, 2h or 1d; empty for no end.")
            request.expires_in.FromNanoseconds(int(seconds * 1e9))
        return request

    def is_bound(self, request: Any, known_state: int) -> bool:
        """Whether it is made exactly as it was shown, or not at all, if somebody else makes a change meanwhile.

        Stopping trade must not wait for that.
        """
        if isinstance(request, pb.SetTradingStateRequest):
            return _is_looser(request.state, known_state)
        return can_expect(request)


def can_expect(request: Any) -> bool:
    """Whether it can be bound to a version of the control state; what is no part of that cannot."""
    return "expected_control_version" in request.DESCRIPTOR.fields_by_name


def _trading_state(form: Form) -> pb.SetTradingStateRequest:
    state = choice(form, "state", enum_choices(pb.TradingState))
    lift = form.get("lift", "")
    return pb.SetTradingStateRequest(state=state, lifts=[lift] if lift else [])  # type: ignore[arg-type]  # a number


def _risk_of_state(form: Form, known: Known) -> str:
    wanted = enum_choices(pb.TradingState).get(form.get("state", ""), pb.TRADING_STATE_HALTED)
    if _is_looser(wanted, known.control.trading_state):
        return "Orders may trade again."
    if form.get("span", "").strip() and wanted != pb.TRADING_STATE_ACTIVE:
        return f"Orders may trade again BY THEMSELVES after {form['span'].strip()}, without another question."
    return ""


def _is_looser(wanted: int, now: int) -> bool:
    return now in _STRICTNESS and wanted in _STRICTNESS[: _STRICTNESS.index(now)]


def _breaker(form: Form) -> pb.SetBreakerRequest:
    mode = choice(form, "mode", enum_choices(pb.BreakerMode))
    return pb.SetBreakerRequest(replica=needed(form, "replica"), mode=mode)  # type: ignore[arg-type]  # a number


def _risk_of_breaker(form: Form, known: Known) -> str:
    replica, mode = form.get("replica", ""), form.get("mode", "")
    if mode == "forced_closed":
        return f"{replica} then gets every order, whatever it answers."
    return risk_without(known.status.replicas, replica) if mode == "forced_open" else ""


def _drain(form: Form) -> pb.DrainReplicaRequest:
    return pb.DrainReplicaRequest(replica=needed(form, "replica"))


def _resume(form: Form) -> pb.ResumeReplicaRequest:
    return pb.ResumeReplicaRequest(replica=needed(form, "replica"))


def _flag(form: Form) -> pb.SetFlagRequest:
    return pb.SetFlagRequest(name=needed(form, "flag"), enabled=bool(choice(form, "value", {"on": 1, "off": 0})))


def _chain(form: Form) -> pb.SetChainRequest:
    stages = [stage for number in range(len(STAGES)) if (stage := form.get(f"stage{number}", ""))]
    for stage in stages:
        if stage not in STAGES:
            raise FormError(f"The stages are {', '.join(STAGES)}.")
    if len(set(stages)) < len(stages):
        raise FormError("Each stage stands in the chain at most once.")
    return pb.SetChainRequest(stages=stages)


def _abort(form: Form) -> pb.AbortCanaryRequest:
    return pb.AbortCanaryRequest(model=form.get("model", ""))


def _promote(form: Form) -> pb.PromoteCanaryRequest:
    return pb.PromoteCanaryRequest(model=form.get("model", ""))


def _weight(form: Form) -> pb.SetCanaryWeightRequest:
    try:
        percent = float(form.get("percent", ""))
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:
        raise FormError("Share of the flows: a number of percent, 0 to 100.")
    hold = choice(form, "hold", {"yes": 1, "no": 0})
    return pb.SetCanaryWeightRequest(model=form.get("model", ""), weight=percent / 100, hold=bool(hold))


def _roll_back(form: Form) -> pb.RollBackRequest:
    return pb.RollBackRequest(model=form.get("model", ""))


def _canary(form: Form) -> pb.StartCanaryRequest:
    try:
        steps = [float(percent) / 100 for percent in form.get("steps", "").replace(",", " ").replace("%", " ").split()]
    except ValueError:
        raise FormError("Steps: numbers of percent, like 5 25 50 100; empty for those of the settings.") from None
    return pb.StartCanaryRequest(
        model_version=needed(form, "model_version"),
        model=form.get("model", ""),
        steps=steps,
        instrument=form.get("instrument", "").strip(),
        strategy=form.get("strategy", "").strip(),
    )


def _load(form: Form) -> pb.LoadModelRequest:
    replica = form.get("replica", "")
    return pb.LoadModelRequest(
        model_version=needed(form, "model_version"), model=form.get("model", ""), replicas=[replica] if replica else []
    )


def _alias(form: Form) -> pb.SetModelAliasRequest:
    alias = form.get("alias", "")
    if alias not in ALIASES:
        raise FormError(f"Alias: one of {', '.join(ALIASES)}.")
    return pb.SetModelAliasRequest(
        model_version=needed(form, "model_version"), model=form.get("model", ""), alias=alias
    )


_NEW_DECIDER: Final = "Another model then decides every order of this model."
_TRIAL: Final = (
    "From its first step on it decides real orders. If it does worse it is rolled back, at once and by itself."
)

ACTS: Final[Mapping[str, Act]] = {
    act.name: act
    for act in (
        Act("trading_state", "Set the trading state", "SetTradingState", _trading_state, _risk_of_state),
        Act("breaker", "Set a breaker", "SetBreaker", _breaker, _risk_of_breaker),
        Act(
            "drain",
            "Drain a replica",
            "DrainReplica",
            _drain,
            lambda form, known: risk_without(known.status.replicas, form.get("replica", "")),
        ),
        Act("resume", "Give a replica its orders back", "ResumeReplica", _resume, can_end=False),
        Act("flag", "Set a flag", "SetFlag", _flag),
        Act(
            "chain",
            "Set the fallback chain",
            "SetChain",
            _chain,
            lambda _form, _known: "Every order is answered by other sources, or in another order.",
        ),
        Act(
            "canary_start",
            "Start a canary",
            "StartCanary",
            _canary,
            lambda _form, _known: _TRIAL,
            can_end=False,
            seconds=LOAD_SECONDS,
            leads_to=_MODELS,
            chooses_version=True,
        ),
        Act("canary_abort", "End the canary", "AbortCanary", _abort, can_end=False, leads_to=_MODELS),
        Act(
            "canary_promote",
            "Make the canary the champion",
            "PromoteCanary",
            _promote,
            lambda _form, _known: _NEW_DECIDER,
            can_end=False,
            seconds=LOAD_SECONDS,
            leads_to=_MODELS,
        ),
        Act("canary_weight", "Set the canary's share", "SetCanaryWeight", _weight, can_end=False, leads_to=_MODELS),
        Act(
            "roll_back",
            "Make the previous champion the champion again",
            "RollBack",
            _roll_back,
            lambda _form, _known: _NEW_DECIDER,
            can_end=False,
            seconds=LOAD_SECONDS,
            leads_to=_MODELS,
        ),
        Act(
            "model_load",
            "Load a version",
            "LoadModel",
            _load,
            can_end=False,
            seconds=LOAD_SECONDS,
            leads_to=_MODELS,
            chooses_version=True,
        ),
        Act(
            "model_alias",
            "Set an alias",
            "SetModelAlias",
            _alias,
            lambda form, _known: _NEW_DECIDER if form.get("alias") == "champion" else "",
            can_end=False,
            seconds=LOAD_SECONDS,
            leads_to=_MODELS,
            chooses_version=True,
        ),
        Act("alert_rule", "Set an alert rule", "SetAlertRule", set_request, can_end=False, leads_to=_ALERTS),
        Act(
            "alert_rule_delete",
            "Delete an alert rule",
            "DeleteAlertRule",
            delete_request,
            lambda _form, _known: "Nobody is told of this any more.",
            can_end=False,
            leads_to=_ALERTS,
        ),
    )
}
"""By name."""


def replica_names(replicas: Iterable[pb.ReplicaStatus]) -> list[str]:
    """What a form offers: every replica, and a role with several endpoints for all of them."""
    found: list[str] = []
    for one in replicas:
        model, _, name = one.name.rpartition("/")
        role = enum_name(pb.ReplicaRole, one.role).lower()
        for offered in (f"{model}/{role}" if model else role, one.name):
            if offered not in found and (name != role or offered == one.name):
                found.append(offered)
    return found
