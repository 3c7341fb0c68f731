"""The methods that are called over HTTP, and the paths that lead to them: the one table of both.

Every method with one answer is `POST /package.Service/Method`, which is its path over gRPC as well. The few that people
type have a second path, in `PATHS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

_DECISION: Final = "/pretrade.decision.v1.DecisionService/"
_ADMIN: Final = "/pretrade.admin.v1.AdminService/"


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
}
"""By full method."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method and who answers it."""

    name: str
    """`/package.Service/Method`."""
    request: type[Message]
    response: type[Message]
    is_streamed: bool
    serialize: Callable[[Any], bytes] | None
    """What it answers as bytes; None where it answers bytes."""
    takes_bytes: bool
    answer: Any
    """The servicer's method; None where it takes or gives a stream."""
    answers: Any
    """The servicer's method where it has one request and a stream of answers; otherwise None."""


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
                is_streamed=handler.unary_unary is None,
                serialize=handler.response_serializer,
                takes_bytes=handler.request_deserializer is None,
                answer=handler.unary_unary,
                answers=handler.unary_stream,
            )

    def __getitem__(self, name: str) -> Method:
        return self._methods[name]

    def routes(self) -> Iterator[tuple[Path, Method]]:
        """Every path with the method that it leads to."""
        for name, method in self._methods.items():
            yield Path("POST", name), method
            for shorter in PATHS.get(name, ()):
                yield shorter, method
