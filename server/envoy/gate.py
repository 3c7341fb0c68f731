"""The gate: admission in Envoy, for calls that the event loop has not taken up yet.

`server/decision/admission.py` sees a call only when Python does. In an overload that is too late: the calls that wait
before it make every answer late, and refusing them there takes time from those that are answered. Envoy therefore
counts the calls, from their headers to the end of their answers. It refuses those beyond a limit at once, with the
status that admission gives.

The limit follows the same target as admission's. Per window of 0.05 s, with w = the 90th percentile of all times::

    limit ← limit · g + √(limit · g)    where g = target / w, between 0.5 and 2;  min_in_flight ≤ limit ≤ max_in_flight

This is Envoy's adaptive concurrency filter, but with a target in place of the lowest latency it ever saw.

The gate does not count streams, health and reflection: each order on a stream is admitted by itself. It does not count
calls either whose metadata says that all of their orders are reduce-only: the gate cannot read orders, and lets such a
call pass to the lane that admission has for them. If the metadata is untrue, the call is refused as soon as it has been
read, and nothing is decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from google.protobuf.descriptor import ServiceDescriptor

from server.decision.admission import AdmissionSettings, overloaded
from server.envoy.framing import status_headers
from server.rpc import status
from server.rpc.call_context import REDUCE_ONLY

_FILTER: Final = "gate"
_TYPE: Final = "type.googleapis.com/envoy.extensions.filters.http.adaptive_concurrency.v3.AdaptiveConcurrency"
_FILTER_CONFIG: Final = "type.googleapis.com/envoy.config.route.v3.FilterConfig"
_TOO_MANY_REQUESTS: Final = 429
_WINDOW: Final = "0.05s"
_PERCENTILE: Final = 90
REASON: Final = overloaded().reason
REFUSED: Final = "adaptive_concurrency.gradient_controller.rq_blocked"
"""Envoy's own count of refused calls, past the statistics' prefix."""


def http_filter(settings: AdmissionSettings) -> dict[str, Any]:
    """The filter that counts and refuses."""
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
                    "fixed_value": f"{settings.target_seconds:.9f}s",
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
    pure: dict[str, Any] = {"grpc": {}}
    reducing = {"headers": [{"name": REDUCE_ONLY, "present_match": True}]}
    return [
        *(_route(pure | reducing | {"path": path}, (*translators, _FILTER)) for path in paths),
        *(_route(pure | {"path": path}, translators) for path in paths),
        _route(pure | {"prefix": "/"}, (*translators, _FILTER)),
        *(_route({"path": path}, ()) for path in paths),
        _route({"prefix": "/"}, (_FILTER,)),
    ]


def _route(match: Mapping[str, Any], disabled: Sequence[str]) -> dict[str, Any]:
    """A route to nowhere: an application is none, but filters look for one."""
    config = {"@type": _FILTER_CONFIG, "disabled": True}
    return {"match": match, "non_forwarding_action": {}, "typed_per_filter_config": dict.fromkeys(disabled, config)}


def reply() -> dict[str, Any]:
    """The answer to a refused call: the status that admission would give; over gRPC-Web and JSON with HTTP 429."""
    wire = status.of(overloaded())
    headers = [{"header": {"key": name.decode(), "value": value.decode()}} for name, value in status_headers(*wire)]
    code = {"default_value": _TOO_MANY_REQUESTS, "runtime_key": "pretrade.gate.status"}
    return {
        "mappers": [
            {
                "filter": {"status_code_filter": {"comparison": {"op": "EQ", "value": code}}},
                "body": {"inline_string": wire[1]},
                "headers_to_add": [
                    header | {"append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
                    for header in headers
                    if header["header"]["key"] != "grpc-message"  # made of the body
                ],
            }
        ]
    }
