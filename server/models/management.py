"""How versions are loaded into one running model server: one way for each protocol, for the same loader."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, Protocol

import grpc
import grpc.aio

from pretrade.wire.torchserve import management_pb2, management_pb2_grpc

if TYPE_CHECKING:
    from server.inference.replica import Replica

CALL_SECONDS: Final = 10.0
"""For one call that loads nothing."""


class LoadError(Exception):
    """A replica did not get a version, or gives other scores with it than it should."""


class Management(Protocol):
    """The words of one protocol, over a channel to one address of a replica.

    Every step can be repeated: what is done already stays as it is.
    """

    @property
    def tolerance(self) -> float:
        """How far a canned score may be from what the version's archive says."""

    async def loaded(self, channel: grpc.aio.Channel, replica: Replica) -> list[str]:
        """The versions that can be asked for; none when that cannot be found out."""

    async def load(self, channel: grpc.aio.Channel, replica: Replica, version: str) -> None:
        """Has a version served beside the others.

        Raises:
            LoadError: It is refused, or the server cannot be reached.
        """

    async def unload(self, channel: grpc.aio.Channel, replica: Replica, version: str) -> None:
        """Takes a version away; one that is not there is fine.

        Raises:
            LoadError: It is refused, or the server cannot be reached.
        """

    async def make_default(self, channel: grpc.aio.Channel, replica: Replica, version: str) -> None:
        """Has requests that name no version answered by this one, where the server lets one choose.

        Raises:
            LoadError: It is refused, or the server cannot be reached.
        """


class TorchServeManagement:
    """TorchServe's management service.

    Args:
        archive_url: Where TorchServe finds a version; holds `{version}`.
        timeout_seconds: For loading one.
    """

    tolerance: Final = 1e-6
    """A matrix product rounds by the shape of its batch."""

    def __init__(self, archive_url: str, timeout_seconds: float) -> None:
        self._archive_url = archive_url
        self._timeout_seconds = timeout_seconds

    async def loaded(self, channel: grpc.aio.Channel, replica: Replica) -> list[str]:
        """See `Management`."""
        request = management_pb2.DescribeModelRequest(model_name=replica.model_name, model_version="all")
        try:
            response = await _stub(channel).DescribeModel(request, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError:
            return []
        return [model["modelVersion"] for model in json.loads(response.msg)]

    async def load(self, channel: grpc.aio.Channel, replica: Replica, version: str) -> None:
        """See `Management`."""
        request = management_pb2.RegisterModelRequest(
            url=self._archive_url.format(version=version),
            model_name=replica.model_name,
            batch_size=1,
            initial_workers=1,
            synchronous=True,
        )
        try:
            await _stub(channel).RegisterModel(request, timeout=self._timeout_seconds)
        except grpc.aio.AioRpcError as error:
            # TorchServe 0.12 has no code and no words for what is there already: another process was faster.
            if version not in await self.loaded(channel, replica):
                raise refused(replica, f"load {version}", error) from error

    async def unload(self, channel: grpc.aio.Channel, replica: Replica, version: str) -> None:
        """See `Management`."""
        request = management_pb2.UnregisterModelRequest(model_name=replica.model_name, model_version=version)
        try:
            await _stub(channel).UnregisterModel(request, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise refused(replica, f"unload {version}", error) from error

    async def make_default(self, channel: grpc.aio.Channel, replica: Replica, version: str) -> None:
        """See `Management`."""
        request = management_pb2.SetDefaultRequest(model_name=replica.model_name, model_version=version)
        try:
            await _stub(channel).SetDefault(request, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise refused(replica, f"make {version} the default", error) from error


def refused(replica: Replica, what: str, error: grpc.aio.AioRpcError) -> LoadError:
    """The error of a call that failed."""
    said, _, _ = (error.details() or "").partition("\n")
    return LoadError(f"{replica.name} did not {what}: {error.code().name} {said}")


def _stub(channel: grpc.aio.Channel) -> management_pb2_grpc.ManagementAPIsServiceAsyncStub:
    stub: management_pb2_grpc.ManagementAPIsServiceAsyncStub = management_pb2_grpc.ManagementAPIsServiceStub(channel)
    return stub
