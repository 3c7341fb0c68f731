"""`grpc.health.v1`, for any number of watchers, including those that do not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import NoReturn

from grpc_health.v1 import health_pb2

from server.errors import UnknownMethodError, UnknownServiceError
from server.rpc.call import Call

_Response = health_pb2.HealthCheckResponse


class HealthServicer:
    """Answers `grpc.health.v1` from a table, on any number of ports. Used from one event loop.

    A change of the table waits for no watcher. Every watcher has an event of its own that signals a change, and writes
    the newest status when its connection takes it. A watcher that does not read therefore delays only itself, and the
    status that it gets in the end is current. (`grpc_health`'s own servicer holds a lock of the service while it writes
    to a watcher.)
    """

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._watchers: dict[str, set[asyncio.Event]] = {}

    def set(self, service: str, serving: bool) -> None:
        """Says of a service whether it is SERVING."""
        if self._serving.get(service) == serving:
            return
        self._serving[service] = serving
        for changed in self._watchers.get(service, ()):
            changed.set()

    def is_serving(self, service: str = "") -> bool:
        """Whether a service is SERVING; by default the server as a whole."""
        return self._serving.get(service, False)

    async def Check(self, request: health_pb2.HealthCheckRequest, call: Call) -> health_pb2.HealthCheckResponse:
        """The status of a service; NOT_FOUND for one that was never set."""
        if request.service not in self._serving:
            raise UnknownServiceError
        return self._status(request.service)

    async def List(self, request: object, call: Call) -> NoReturn:
        """Not served: no caller needs all services at once."""
        raise UnknownMethodError

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, call: Call
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status of a service now, and again whenever it has changed; SERVICE_UNKNOWN until it is set."""
        changed, told = asyncio.Event(), None
        watchers = self._watchers.setdefault(request.service, set())
        watchers.add(changed)
        try:
            while True:
                changed.clear()
                if (status := self._status(request.service)) != told:
                    yield status
                    told = status
                await changed.wait()
        finally:
            watchers.discard(changed)
            if not watchers and self._watchers.get(request.service) is watchers:
                del self._watchers[request.service]

    def _status(self, service: str) -> health_pb2.HealthCheckResponse:
        serving = self._serving.get(service)
        if serving is None:
            return _Response(status=_Response.SERVICE_UNKNOWN)
        return _Response(status=_Response.SERVING if serving else _Response.NOT_SERVING)
