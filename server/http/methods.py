"""The methods that are called over HTTP, and the paths that lead to them: the one table of both.

Every method with one answer is `POST /package.Service/Method`, which is its path over gRPC as well. The few that people
type have a second path, in `PATHS`; those that are watched have no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

from server.rpc.events import Watch

_DECISION: Final = "/pretrade.decision.v1.DecisionService/"
_ADMIN: Final = "/pretrade.admin.v1.AdminService/"
_AUDIT: Final = "/pretrade.audit.v1.AuditService/"


class Path(NamedTuple):
    """How a method is called besides by its own path."""

    verb: str
    path: str
    field: str = ""
    """The request's field that the path ends with, as its last part in braces; empty for none."""


PATHS: Final[Mapping[str, tuple[Path, ...]]] = {
    f"{_DECISION}Decide": (Path("POST", "/v1/decide"),),
    f"{_DECISION}DecideBatch": (Path("POST", "/v1/decide:batch"),),
    f"{_ADMIN}ListModels": (Path("GET", "/models"),),
    f"{_ADMIN}ListSignals": (Path("GET", "/signals"), Path("GET", "/signals/{instrument}", "instruments")),
    f"{_ADMIN}WatchFeatures": (Path("GET", "/v1/signals/events"),),
    f"{_AUDIT}WatchDecisions": (Path("GET", "/v1/decisions/events"),),
}
"""By full method."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method and who answers it."""

    name: str
    """`/package.Service/Method`."""
    request: type[Message]
    response: type[Message]
    serialize: Callable[[Any], bytes] | None
    """What it answers as bytes; None where it answers bytes."""
    takes_bytes: bool
    answer: Any
    """The servicer's method; None where it takes or gives a stream."""
    watch: Watch | None = None
    """The servicer's method that gives the answers of a stream as events; None where there is none."""


class Methods:
    """The methods of one port, registered the way generated code does it."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Nothing: the same methods come as registered ones."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Serves the methods of a service."""
        for name, handler in handlers.items():
            found = descriptor_pool.Default().FindMethodByName(f"{service}.{name}")
            self._methods[f"/{service}/{name}"] = Method(
                name=f"/{service}/{name}",
                request=message_factory.GetMessageClass(found.input_type),
                response=message_factory.GetMessageClass(found.output_type),
                serialize=handler.response_serializer,
                takes_bytes=handler.request_deserializer is None,
                answer=handler.unary_unary,
            )

    def add_watch(self, name: str, watch: Watch) -> None:
        """Has a method, which is registered already, watched over HTTP as well."""
        self._methods[name] = replace(self._methods[name], watch=watch)

    def routes(self) -> Iterator[tuple[Path, Method]]:
        """Every path with the method that it leads to."""
        for name, method in self._methods.items():
            yield Path("POST", name), method
            for shorter in PATHS.get(name, ()):
                yield shorter, method
