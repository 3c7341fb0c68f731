"""The calls of one person to the server, with that person's own credentials; and what a call that fails says."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final, TypeVar

import grpc
import grpc.aio

from pretrade.admin.v1 import admin_pb2_grpc
from pretrade.audit.v1 import audit_pb2_grpc
from pretrade.client.credentials import ClientCredentials
from pretrade.client.errors import CredentialsError

T = TypeVar("T")

SECONDS: Final = 3.0
"""How long a call may take that waits for nothing but the server."""
AUDIT_SECONDS: Final = 20.0
"""How long a call may take that reads the database of the audit."""
_STATUS_DETAILS: Final = "grpc-status-details-bin"
"""Trailing metadata with which a server itself says why it refuses."""
_OTHER_PORT: Final = "Method not found!"
"""What a gRPC server says that does not have the method."""


class CallFailedError(Exception):
    """A call has no answer.

    Args:
        message: One or two sentences for people.
        code: The gRPC status.
        may_have_arrived: Whether the server may have carried it out all the same.
    """

    def __init__(self, message: str, code: grpc.StatusCode, *, may_have_arrived: bool = False) -> None:
        super().__init__(message)
        self.code: Final = code
        self.may_have_arrived: Final = may_have_arrived


class ServerCalls:
    """One person's connection to the admin port.

    Args:
        address: `host:port` of the admin port.
        credentials: What is shown with each call.

    Raises:
        CredentialsError: A file cannot be read, or a token would travel in the open.
    """

    def __init__(self, address: str, credentials: ClientCredentials) -> None:
        self.address: Final = address
        self._channel = credentials.aio_channel(address)
        self.admin: Final = admin_pb2_grpc.AdminServiceStub(self._channel)
        self.audit: Final = audit_pb2_grpc.AuditServiceStub(self._channel)

    async def answer(self, call: Awaitable[T]) -> T:
        """What a call answers.

        Raises:
            CallFailedError: It has no answer.
        """
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise failed(error, self.address) from None
        except CredentialsError as error:  # the file of the token has gone
            raise CallFailedError(str(error), grpc.StatusCode.UNAUTHENTICATED) from None

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()


def failed(error: grpc.aio.AioRpcError, address: str) -> CallFailedError:
    """Why a call has no answer, for people."""
    code, details = error.code(), (error.details() or "it gave no reason").rstrip(".")
    if code is grpc.StatusCode.UNIMPLEMENTED and details == _OTHER_PORT.rstrip("."):
        message = f"{address} is not the admin port of a server of this version: it does not know this call."
    elif code is grpc.StatusCode.UNAVAILABLE and not _is_said_by_the_server(error):
        message = f"{address} cannot be reached: {details}."
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED and not _is_said_by_the_server(error):
        message = f"{address} did not answer in time."
    else:
        message = f"{code.name}: {details}."
    return CallFailedError(message, code, may_have_arrived=_may_have_arrived(error))


def _may_have_arrived(error: grpc.aio.AioRpcError) -> bool:
    """Whether a call that failed for its connection, or for its time, may have been carried out all the same."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return True
    if error.code() is not grpc.StatusCode.UNAVAILABLE or _is_said_by_the_server(error):
        return False
    return not (error.details() or "").startswith("failed to connect")


def _is_said_by_the_server(error: grpc.aio.AioRpcError) -> bool:
    return any(name == _STATUS_DETAILS for name, _ in error.trailing_metadata() or ())
