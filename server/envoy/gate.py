"""The gate: admission in Envoy, for calls that the event loop has not taken up yet.

`server/decision/admission.py` sees a call only when Python does. In an overload that is too late: the calls that wait
before it make every answer late, and refusing them there takes time from those that are answered. Envoy therefore
counts the calls, from their headers to the end of their answers. It refuses those beyond a limit at once, with the
status that admission gives.

The limit follows the latency of all calls. Per window of 0.05 s, with w = the 90th percentile of all times::

    limit ← limit · g + √(limit · g)    where g = target / w, between 0.5 and 2;  least ≤ limit ≤ most

This is Envoy's adaptive concurrency filter, but with a target in place of the lowest latency it ever saw: admission's,
or 30 ms if that is shorter. `least` and `most` are what `CallLimits` says ten times a second: Envoy can read neither
deadlines nor how many orders a call has, and the server knows both.

The gate does not count streams, health and reflection: each order on a stream is admitted by itself. It does not count
calls either whose metadata says that all of their orders are reduce-only: the gate cannot read orders, and lets such a
call pass to the lane that admission has for them. If the metadata is untrue, the call is refused as soon as it has been
read, and nothing is decided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from google.protobuf.descriptor import ServiceDescriptor

from server.decision.admission import WAITING_BATCHES, Admission, AdmissionSettings, overloaded
from server.http import problems, transcoding
from server.http.methods import PATHS
from server.rpc import status
from server.rpc.call_context import REDUCE_ONLY
from server.rpc.framing import Header, status_headers

_FILTER: Final = "gate"
_TYPE: Final = "type.googleapis.com/envoy.extensions.filters.http.adaptive_concurrency.v3.AdaptiveConcurrency"
_FILTER_CONFIG: Final = "type.googleapis.com/envoy.config.route.v3.FilterConfig"
_TOO_MANY_REQUESTS: Final = 429
_WINDOW: Final = "0.05s"
_PERCENTILE: Final = 90
REASON: Final = overloaded().reason
REFUSED: Final = "adaptive_concurrency.gradient_controller.rq_blocked"
"""Envoy's own count of refused calls, past the statistics' prefix."""
_MOST: Final = "adaptive_concurrency.gradient_controller.max_concurrency_limit"
_LEAST: Final = "adaptive_concurrency.gradient_controller.min_concurrency"
_IS_REFUSAL: Final = {
    "status_code_filter": {
        "comparison": {
            "op": "EQ",
            "value": {"default_value": _TOO_MANY_REQUESTS, "runtime_key": "pretrade.gate.status"},
        }
    }
}
_IS_GRPC: Final = {
    "header_filter": {
        "header": {"name": "content-type", "string_match": {"prefix": transcoding.GRPC.decode()}},
    }
}
_GROWTH: Final = 1.5
_TARGET_SECONDS: Final = 0.03
"""What nine in ten calls take at most where calls hardly wait."""


class UnderWay(NamedTuple):
    """The unary calls under way."""

    calls: int
    orders: int
    """In them, as many as are decided at once."""
    patient: int
    """Calls of one order without a deadline: those that may wait for a place."""
    batches: int
    """Calls of several orders, which may wait for places as well."""


class CallLimits:
    """Bounds of the calls that the gate may let in: at most as many as admission has places for their orders.

    The places are those for ordinary orders, and no fewer than `min_in_flight`.

    A call weighs as much as the orders in it that are decided at once, which is 256 at most. While the calls under way
    weigh no more than admission has places, the limit is that number of places. Otherwise it is that number divided by
    the mean weight of a call. It falls at once, and grows by half at each look: without that, every second look would
    find the calls of a flood of batches few again.

    The gate's own target is short, so that it closes quickly in an overload. Callers who can wait for longer are let in
    all the same while their orders are decided in time: as long as nine in ten are, the least grows by its root at each
    look. When they are not, it is `min_in_flight` again.

    Calls without a deadline may wait for a place in admission, until `max_in_flight` are under way or wait. If they are
    a third of the calls under way, the gate lets in a third of those that may wait. They are slow by the gate's own
    measure, which must not close it for that reason: the least is then a third of the most. Batches may wait as well,
    some at a time, and count in the same way.

    Args:
        settings: Bounds of the limit.
        admission: Has the places.
    """

    def __init__(self, settings: AdmissionSettings, admission: Admission) -> None:
        self._settings = settings
        self._admission = admission
        self._calls = float(settings.max_in_flight)
        self._least = float(settings.min_in_flight)
        self._patient_share = self._batch_share = 0.0

    def update(self, under_way: UnderWay) -> Mapping[str, int]:
        """Envoy's runtime settings, by the calls that are under way now."""
        places = max(self._admission.ordinary_limit, self._settings.min_in_flight)
        waiting = self._admission.waiting_orders
        calls, orders = under_way.calls - waiting, under_way.orders - waiting
        wanted = places if orders <= places else max(1.0, places * calls / orders)
        self._calls = min(wanted, _GROWTH * self._calls)
        if under_way.calls:
            self._patient_share = under_way.patient / under_way.calls
            self._batch_share = under_way.batches / under_way.calls
        room = self._patient_share * (self._settings.max_in_flight - places)
        room += self._batch_share * WAITING_BATCHES
        most = min(self._settings.max_in_flight, int(self._calls + room))
        if self._admission.keeps_up:
            self._least = min(most, self._least + math.sqrt(self._least))
        else:
            self._least = self._settings.min_in_flight
        least = max(int(self._least), int((self._patient_share + self._batch_share) * most))
        return {_MOST: most, _LEAST: min(least, most)}


def http_filter(settings: AdmissionSettings, cap_seconds: float) -> dict[str, Any]:
    """The filter that counts and refuses.

    Args:
        settings: Bounds of the limit.
        cap_seconds: The most that the server allows a call.
    """
    return {
        "name": _FILTER,
        "typed_config": {
            "@type": _TYPE,
            "gradient_controller_config": {
                "sample_aggregate_percentile": {"value": _PERCENTILE},
                "concurrency_limit_params": {
                    "max_concurrency_limit": settings.max_in_flight,
                    "concurrency_update_interval": _WINDOW,
                },
                "min_rtt_calc_params": {
                    "fixed_value": f"{min(_TARGET_SECONDS, settings.target(cap_seconds)):.9f}s",
                    "min_concurrency": settings.min_in_flight,
                    "buffer": {"value": 0},
                },
            },
            "concurrency_limit_exceeded_status": {"code": _TOO_MANY_REQUESTS},
        },
    }


def routes(service: ServiceDescriptor, translators: Sequence[str]) -> list[dict[str, Any]]:
    """The routes of a service's unary methods, which pass the gate, and of all else, which does not.

    A filter that a call's route disables is not even made for it, so calls in gRPC's own form skip the others.

    Args:
        service: What the gate protects.
        translators: Names of the filters that translate what is not in gRPC's own form.
    """
    paths = [f"/{service.full_name}/{method.name}" for method in service.methods if not method.server_streaming]
    shorter = [one.path for path in paths for one in PATHS.get(path, ())]
    pure: dict[str, Any] = {"grpc": {}}
    reducing = {"headers": [{"name": REDUCE_ONLY, "present_match": True}]}
    return [
        *(_route(pure | reducing | {"path": path}, (*translators, _FILTER)) for path in paths),
        *(_route(pure | {"path": path}, translators) for path in paths),
        _route(pure | {"prefix": "/"}, (*translators, _FILTER)),
        *(_route({"path": path}, ()) for path in (*paths, *shorter)),
        _route({"prefix": "/"}, (_FILTER,)),
    ]


def _route(match: Mapping[str, Any], disabled: Sequence[str]) -> dict[str, Any]:
    """A route to nowhere: an application is none, but filters look for one."""
    config = {"@type": _FILTER_CONFIG, "disabled": True}
    return {"match": match, "non_forwarding_action": {}, "typed_per_filter_config": dict.fromkeys(disabled, config)}


def reply() -> dict[str, Any]:
    """The answer to a refused call: the status that admission would give; in JSON and over gRPC-Web with HTTP 429."""
    error = overloaded()
    code, message, metadata = status.of(error)
    in_json = problems.refusal(error)
    return {
        "mappers": [
            {
                "filter": {"and_filter": {"filters": [_IS_REFUSAL, _IS_GRPC]}},
                "body": {"inline_string": message},
                # `grpc-message` is made of the body.
                "headers_to_add": _added([*status_headers(code, "", metadata), *status.http_headers(error)]),
            },
            {
                "filter": _IS_REFUSAL,
                "body": {"inline_string": in_json.body.decode()},
                "body_format_override": {
                    "text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"},
                    "content_type": problems.CONTENT_TYPE.decode(),
                },
                "headers_to_add": _added(status.http_headers(error)),
            },
        ]
    }


def _added(headers: Iterable[Header]) -> list[dict[str, Any]]:
    return [
        {
            "header": {"key": name.decode(), "value": value.decode()},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        }
        for name, value in headers
    ]
