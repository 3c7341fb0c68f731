"""The examples of the OpenAPI document: requests, what a server answered to them, and a problem of every status.

The requests are written here. What was answered is in `static/answers.json`: `TEST_OPENAPI=docs` has
`tests/integration/test_openapi_examples.py` ask a whole server, with real models, and write that file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from server import errors
from server.errors import PretradeError
from server.http import problems

INSTRUMENT: Final = "BTCUSDT.BINANCE"
DECISION: Final = "01992f4ad1c27c9a8a4f5d3e9b6c7a10"
"""An id of a decision."""
MODEL: Final = "37e85d6f9b1c"
"""A version of a model."""
ANSWERS: Final = Path(__file__).parent / "static/answers.json"
_DECISION: Final = "/pretrade.decision.v1.DecisionService/"
_ADMIN: Final = "/pretrade.admin.v1.AdminService/"
_AUDIT: Final = "/pretrade.audit.v1.AuditService/"
_ORDER: Final[Mapping[str, Any]] = {
    "order_ref": "1",
    "instrument": INSTRUMENT,
    "side": "SIDE_BUY",
    "quantity": 0.05,
    "strategy": "twap",
}
ALERT_RULE: Final[Mapping[str, Any]] = {
    "name": "twap-trades-much",
    "share": {"action": "TRADE", "strategy": "twap"},
    "above": 0.9,
    "lasting": "300s",
    "cooldown": "1800s",
}
"""An alert rule of a user: the share of trades of a strategy."""
_REHEARSED: Final[Mapping[str, Any]] = {"author": "ann", "reason": "a rehearsal", "dry_run": True}
"""What tries a change, and makes none."""
REQUESTS: Final[Mapping[str, Mapping[str, tuple[str, Mapping[str, Any]]]]] = {
    f"{_DECISION}Decide": {
        "market": ("A market order", {"order": _ORDER}),
        "limit": (
            "A limit order with a deadline of its own",
            {"order": {**_ORDER, "limit_price": 60_000.0, "timeout": "0.5s"}},
        ),
        "repeatable": (
            "An order that is safe to send again",
            {"order": {**_ORDER, "idempotency_key": "twap-2026-01-05-1"}},
        ),
        "explained": ("What each feature did to the score", {"order": _ORDER, "explain": True}),
    },
    f"{_DECISION}DecideBatch": {
        "two": ("Two orders", {"orders": [_ORDER, {**_ORDER, "order_ref": "2", "side": "SIDE_SELL"}]}),
    },
    f"{_ADMIN}GetStatus": {
        "all": ("The whole server", {}),
        "one": ("Only the process that answers", {"this_process_only": True}),
    },
    f"{_ADMIN}GetCaller": {"me": ("Who I am", {})},
    f"{_ADMIN}GetControl": {"all": ("Everything that was set", {})},
    f"{_ADMIN}ListChanges": {
        "newest": ("The newest", {"page_size": 1}),
        "trading_state": ("Those of the trading state", {"subject": "trading_state", "page_size": 1}),
    },
    f"{_ADMIN}ListReplicas": {"all": ("All of them", {})},
    f"{_ADMIN}DrainReplica": {"rehearsed": ("What a drain would change", {"replica": "secondary", **_REHEARSED})},
    f"{_ADMIN}ResumeReplica": {"rehearsed": ("What a resume would change", {"replica": "secondary", **_REHEARSED})},
    f"{_ADMIN}SetBreaker": {
        "rehearsed": (
            "What an open breaker would change, for ten minutes",
            {"replica": "secondary", "mode": "BREAKER_MODE_FORCED_OPEN", "expires_in": "600s", **_REHEARSED},
        ),
    },
    f"{_ADMIN}ListFlags": {"all": ("All of them", {})},
    f"{_ADMIN}SetFlag": {
        "rehearsed": ("What turning a flag off would change", {"name": "shadow", "enabled": False, **_REHEARSED}),
    },
    f"{_ADMIN}SetTradingState": {
        "rehearsed": (
            "What a halt would change; without dry_run it halts",
            {"state": "TRADING_STATE_HALTED", **_REHEARSED},
        ),
    },
    f"{_ADMIN}SetChain": {
        "rehearsed": ("What a chain without the last good score would change", {"stages": ["model"], **_REHEARSED}),
    },
    f"{_ADMIN}GetModelMap": {"all": ("All of it", {})},
    f"{_ADMIN}SetModelMap": {
        "rehearsed": (
            "What a rule for one strategy would change",
            {"rules": [{"strategy": "twap*", "model": "default"}], **_REHEARSED},
        ),
    },
    f"{_ADMIN}ReloadConfiguration": {"rehearsed": ("What a reload would change", _REHEARSED)},
    f"{_ADMIN}StartCanary": {
        "rehearsed": (
            "What a canary of three steps would change",
            {"model_version": MODEL, "steps": [0.05, 0.25, 1.0], **_REHEARSED},
        ),
    },
    f"{_ADMIN}SetCanaryWeight": {"rehearsed": ("What another share would change", {"weight": 0.1, **_REHEARSED})},
    f"{_ADMIN}PromoteCanary": {"rehearsed": ("What a promotion would change", _REHEARSED)},
    f"{_ADMIN}AbortCanary": {"rehearsed": ("What the canary's end would change", _REHEARSED)},
    f"{_ADMIN}GetCanary": {"newest": ("The one under way, or the last one", {})},
    f"{_ADMIN}RollBack": {"rehearsed": ("What going back would change", _REHEARSED)},
    f"{_ADMIN}ListAlertRules": {"all": ("All of them, and as a rules file of Prometheus", {})},
    f"{_ADMIN}SetAlertRule": {
        "rehearsed": ("What a rule would change", {"rule": ALERT_RULE, **_REHEARSED}),
    },
    f"{_ADMIN}DeleteAlertRule": {
        "rehearsed": ("What the end of a rule would change", {"name": ALERT_RULE["name"], **_REHEARSED}),
    },
    f"{_ADMIN}ListModels": {"all": ("All of them", {})},
    f"{_ADMIN}GetModelCard": {"one": ("What was measured of a version", {"model_version": MODEL})},
    f"{_ADMIN}LoadModel": {
        "rehearsed": (
            "What loading a version would change",
            {"model_version": MODEL, "replicas": ["secondary"], **_REHEARSED},
        ),
    },
    f"{_ADMIN}SetModelAlias": {
        "rehearsed": (
            "What another challenger would change",
            {"alias": "challenger", "model_version": MODEL, **_REHEARSED},
        ),
    },
    f"{_ADMIN}ListSignals": {"one": ("Those of one instrument", {"instruments": [INSTRUMENT]})},
    f"{_ADMIN}ListBars": {
        "newest": ("The newest minute", {"instrument": INSTRUMENT, "interval": "1m", "page_size": 1}),
    },
    f"{_ADMIN}GetBook": {"best": ("The best two levels", {"instrument": INSTRUMENT, "levels": 2})},
    f"{_AUDIT}GetDecision": {"one": ("One decision", {"decision_id": DECISION})},
    f"{_AUDIT}ListDecisions": {
        "newest": ("The newest decision", {"page_size": 1}),
        "trades": (
            "What was traded in a minute",
            {
                "filter": {
                    "heard_actions": ["HEARD_ACTION_TRADE"],
                    "since": "2026-01-05T09:30:00Z",
                    "until": "2026-01-05T09:31:00Z",
                },
                "page_size": 100,
            },
        ),
    },
    f"{_AUDIT}RecordOutcome": {
        "filled": (
            "A fill, with what the market did afterwards",
            {
                "outcome": {
                    "decision_id": DECISION,
                    "filled_quantity": 0.05,
                    "fill_price": 60_000.5,
                    "markout_bps": 0.4,
                    "reporter": "ems-1",
                }
            },
        ),
    },
    f"{_AUDIT}ReplayDecision": {"one": ("One decision", {"decision_id": DECISION})},
    f"{_AUDIT}ExplainDecision": {"one": ("One decision", {"decision_id": DECISION})},
}
"""By method and name, each with its title."""
PARAMETERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "ListSignals": {"instruments": [INSTRUMENT], "instrument": INSTRUMENT},
    "WatchFeatures": {"instruments": [INSTRUMENT], "interval": "0.5s", "feature_sets": ["mf1"]},
    "WatchDecisions": {"filter.instruments": [INSTRUMENT]},
}
"""Values of the parameters of a GET, by method and name."""
CURSORS: Final[Mapping[str, str]] = {
    f"{_ADMIN}WatchFeatures": "1767605400250000000",
    f"{_AUDIT}WatchDecisions": "4242139bdf4712509e9a547eabf223d4:2+1",
}
"""The place to go on after the event that is shown, by method."""

PROBLEMS: Final[Mapping[int, PretradeError]] = {
    400: errors.InvalidOrderError("INVALID_QUANTITY", "order.quantity: must be finite and > 0", "order.quantity"),
    401: errors.UnauthenticatedError("TOKEN_EXPIRED", "the token has expired"),
    403: errors.PermissionDeniedError("ROLE_MISSING", "needs the role operator"),
    404: errors.UnknownInstrumentError('instruments: this server does not follow "BTCUSD"; did you mean BTCUSDT?'),
    409: errors.KeyReusedError("IDEMPOTENCY_KEY_REUSED", "the idempotency key was used for another order"),
    413: errors.MessageTooLargeError(5_242_880, 1_048_576),
    415: errors.UnsupportedEncodingError("grpc-encoding: b'br' is not supported"),
    429: errors.RateLimitedError("RATE_LIMITED", "more than 5 calls a second", 0.2),
    500: errors.InternalError("the call failed; see the server's log"),
    503: errors.DrainingError("DRAINING", "the server is about to stop"),
    504: errors.DeadlineError("DEADLINE_EXCEEDED", "Deadline Exceeded"),
}
"""An error of every HTTP status."""


def problem(status: int) -> dict[str, Any]:
    """The problem of an HTTP status."""
    return problems.problem(PROBLEMS[status], status)


def answers() -> dict[str, Any]:
    """What a server answered to the first request of each method, by method."""
    found: dict[str, Any] = json.loads(ANSWERS.read_text())
    return found


def event(path: str) -> dict[str, Any]:
    """An event of a method that is watched: what the methods that look once have answered."""
    found = answers()
    if path == f"{_ADMIN}WatchFeatures":
        (signal,) = found[f"{_ADMIN}ListSignals"]["signals"]
        return {"features": signal["features"], "cursor": CURSORS[path]}
    (decision,) = found[f"{_AUDIT}ListDecisions"]["decisions"]
    return {"decision": decision, "cursor": CURSORS[path]}
