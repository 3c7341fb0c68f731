"""An `AdminService` that answers what a test gives it, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc

from pretrade.admin.v1 import admin_pb2_grpc


class RefusedError(Exception):
    """What a method ends with instead of an answer."""

    def __init__(self, code: grpc.StatusCode, why: str) -> None:
        super().__init__(why)
        self.code = code
        self.why = why


class AdminServer:
    """A running one; `asked` holds the method and the request of each call."""

    def __init__(self, address: str, asked: list[tuple[str, Any]]) -> None:
        self.address = address
        self.asked = asked

    @property
    def methods(self) -> list[str]:
        return [method for method, _ in self.asked]


@contextmanager
def admin_server(**answers: Callable[[Any], Any]) -> Iterator[AdminServer]:
    """Serves these methods, each by a function of its request; it may raise `RefusedError`."""
    asked: list[tuple[str, Any]] = []

    def method(name: str, answer: Callable[[Any], Any]) -> Callable[[Any, Any, grpc.ServicerContext], Any]:
        def handle(_self: Any, request: Any, context: grpc.ServicerContext) -> Any:
            copy = type(request)()
            copy.CopyFrom(request)
            asked.append((name, copy))
            try:
                return answer(request)
            except RefusedError as refusal:
                context.abort(refusal.code, refusal.why)

        return handle

    methods = {name: method(name, answer) for name, answer in answers.items()}
    servicer = type("Servicer", (admin_pb2_grpc.AdminServiceServicer,), methods)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    admin_pb2_grpc.add_AdminServiceServicer_to_server(servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield AdminServer(f"127.0.0.1:{port}", asked)
    finally:
        server.stop(None)
