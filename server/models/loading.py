"""Loads model versions into a running TorchServe, and checks each before it may decide orders.

A version is registered beside the loaded ones, under the name that the replica is asked for; requests name the version
that they mean. It is then warmed up and asked for its canned scores, which must be those it gave when it was exported.
Every step can be repeated: what is done already stays as it is.

A replica's management service may be a name with several addresses, such as a headless Service of Kubernetes. Every
step is done at each of them, since the connection that decides orders may lead to any.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING, Final

import grpc
import grpc.aio
import numpy as np
import structlog

from feature_cache.feature_set import ROW
from pretrade.wire.torchserve import management_pb2, management_pb2_grpc
from server.inference import model_sets, wire
from server.inference.outcome import BatchFailedError
from server.inference.token import ManagementToken
from server.models.registry import ModelRecord, ModelUnusableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from server.inference.replica import Replica

_log = structlog.get_logger(__name__)

_TOLERANCE: Final = 1e-6
"""Of a canned score: a matrix product rounds by the shape of its batch."""
_WARM_UP_ROWS: Final = (1, 16, 64, 256)
_WARM_UP_ROUNDS: Final = 5
_AGAIN_SECONDS: Final = 0.2
_CALL_SECONDS: Final = 10.0
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)


class LoadError(Exception):
    """A replica did not get a version, or gives other scores with it than it should."""


class ModelLoader:
    """Loads versions into replicas.

    Args:
        management: `host:port` of each replica's gRPC management service, by the replica's name. A replica that is not
            named is only checked; the server loads nothing into it.
        archive_url: Where TorchServe finds a version; holds `{version}`.
        timeout_seconds: For one version and replica.
        resolve: The addresses, `host:port`, of a `host:port`; raises OSError.
    """

    def __init__(
        self,
        management: Mapping[str, str],
        archive_url: str,
        timeout_seconds: float,
        resolve: Callable[[str], Awaitable[list[str]]] | None = None,
    ) -> None:
        self._management = management
        self._archive_url = archive_url
        self._timeout_seconds = timeout_seconds
        self._resolve = resolve or addresses_of

    def manages(self, replica: str) -> bool:
        """True when versions can be loaded into this replica."""
        return replica in self._management

    async def load(self, replica: Replica, record: ModelRecord) -> None:
        """Has the replica serve a version beside what it serves, warm and checked. Cancelling leaves it registered.

        Raises:
            ModelUnusableError: This server cannot use the version.
            LoadError: It is not there in time, or gives other scores than it should.
        """
        if record.problem:
            raise ModelUnusableError(f"model {record.version}: {record.problem}")
        try:
            async with asyncio.timeout(self._timeout_seconds):
                if self.manages(replica.name):
                    await self._register(replica, record.version)
                await self._prove(replica, record)
        except TimeoutError:
            raise LoadError(
                f"{replica.name}: model {record.version} not served within {self._timeout_seconds:g} s"
            ) from None
        _log.info("model loaded", replica=replica.name, version=record.version, canned_scores=len(record.canned_scores))

    async def unload(self, replica: Replica, version: str) -> None:
        """Takes a version away that no order is sent to; one that is not there is fine.

        Raises:
            LoadError: TorchServe refuses, or cannot be reached.
        """
        if not self.manages(replica.name):
            return
        request = management_pb2.UnregisterModelRequest(model_name=replica.model_name, model_version=version)
        for address in await self._addresses(replica):
            async with self._channel(replica, address) as channel:
                stub = management_pb2_grpc.ManagementAPIsServiceStub(channel)
                try:
                    await stub.UnregisterModel(request, timeout=_CALL_SECONDS)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.NOT_FOUND:
                        raise _refused(replica, f"unload {version}", error) from error
        _log.info("model unloaded", replica=replica.name, version=version)

    async def make_default(self, replica: Replica, version: str) -> None:
        """Has requests that name no version answered by this one, those of other clients and of people.

        Raises:
            LoadError: TorchServe refuses, or cannot be reached.
        """
        if not self.manages(replica.name):
            return
        request = management_pb2.SetDefaultRequest(model_name=replica.model_name, model_version=version)
        for address in await self._addresses(replica):
            async with self._channel(replica, address) as channel:
                stub = management_pb2_grpc.ManagementAPIsServiceStub(channel)
                try:
                    await stub.SetDefault(request, timeout=_CALL_SECONDS)
                except grpc.aio.AioRpcError as error:
                    raise _refused(replica, f"make {version} the default", error) from error

    async def loaded(self, replica: Replica) -> list[str]:
        """The versions that a replica has registered, at all of its addresses; none when that cannot be found out."""
        if not self.manages(replica.name):
            return [replica.model.version] if replica.model is not None else []
        try:
            addresses = await self._addresses(replica)
        except LoadError:
            return []
        found = [await self._loaded_at(replica, address) for address in addresses]
        return [version for version in found[0] if all(version in others for others in found[1:])]

    async def _addresses(self, replica: Replica) -> list[str]:
        """Where its management service is, one address or more."""
        try:
            return await self._resolve(self._management[replica.name])
        except OSError as error:
            raise LoadError(f"{replica.name}: {self._management[replica.name]}: {error}") from error

    async def _loaded_at(self, replica: Replica, address: str) -> list[str]:
        request = management_pb2.DescribeModelRequest(model_name=replica.model_name, model_version="all")
        async with self._channel(replica, address) as channel:
            try:
                response = await management_pb2_grpc.ManagementAPIsServiceStub(channel).DescribeModel(
                    request, timeout=_CALL_SECONDS
                )
            except grpc.aio.AioRpcError:
                return []
        return [model["modelVersion"] for model in json.loads(response.msg)]

    def _channel(self, replica: Replica, address: str) -> grpc.aio.Channel:
        shown = None if replica.token is None else (ManagementToken(replica.token),)
        if replica.tls is None:
            return grpc.aio.insecure_channel(address, interceptors=shown)
        # What was looked up is an address; the certificate has the name.
        host = self._management[replica.name].rpartition(":")[0].strip("[]")
        return replica.tls.channel(address, interceptors=shown, host=host)

    async def _register(self, replica: Replica, version: str) -> None:
        for address in await self._addresses(replica):
            await self._register_at(replica, address, version)

    async def _register_at(self, replica: Replica, address: str, version: str) -> None:
        if version in await self._loaded_at(replica, address):
            return
        request = management_pb2.RegisterModelRequest(
            url=self._archive_url.format(version=version),
            model_name=replica.model_name,
            batch_size=1,
            initial_workers=1,
            synchronous=True,
        )
        async with self._channel(replica, address) as channel:
            try:
                await management_pb2_grpc.ManagementAPIsServiceStub(channel).RegisterModel(
                    request, timeout=self._timeout_seconds
                )
            except grpc.aio.AioRpcError as error:
                # TorchServe 0.12 has no code and no words for what is there already: another process was faster.
                if version not in await self._loaded_at(replica, address):
                    raise _refused(replica, f"load {version}", error) from error

    async def _prove(self, replica: Replica, record: ModelRecord) -> None:
        """Warms the version up and compares its canned scores."""
        feature_set = record.features
        zeros = model_sets.row_of(feature_set, bytes(feature_set.row_bytes))
        while True:
            try:
                await replica.ask([zeros], record.version)
                break
            except BatchFailedError as error:
                # Registered by another process whose workers are still starting, or not there at all.
                _log.debug("model not served yet", replica=replica.name, version=record.version, detail=str(error))
                await asyncio.sleep(_AGAIN_SECONDS)
        try:
            for rows in _WARM_UP_ROWS:
                for _ in range(_WARM_UP_ROUNDS):
                    await replica.ask([zeros] * rows, record.version)
            rows_of_record = record.canned_rows.astype(ROW)
            canned = [model_sets.row_of(feature_set, row.tobytes()) for row in rows_of_record] or [zeros]
            answer = await replica.ask(canned, record.version)
        except BatchFailedError as error:
            raise LoadError(f"{replica.name}: model {record.version} fails: {error}") from error
        _compare(replica.name, record, answer)


async def addresses_of(target: str) -> list[str]:
    """The addresses, `host:port`, that the system knows of a `host:port`; raises OSError without any.

    Those of IPv4 where there are such: the others lead to the same servers, which need not listen on them.
    """
    host, _, port = target.rpartition(":")
    found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    hosts = {family: dict.fromkeys(str(one[4][0]) for one in found if one[0] is family) for family in _FAMILIES}
    return [f"{host}:{port}" for host in hosts[socket.AF_INET]] or [
        f"[{host}]:{port}" for host in hosts[socket.AF_INET6]
    ]


def _compare(replica: str, record: ModelRecord, answer: wire.ScoreBatch) -> None:
    """Raises `LoadError` unless the answer is that of the version."""
    if answer.model.threshold != np.float32(record.threshold):
        raise LoadError(f"{replica}: model {record.version} has threshold {answer.model.threshold}")
    if len(record.canned_scores):
        difference = float(np.max(np.abs(answer.scores - record.canned_scores)))
        if not difference <= _TOLERANCE:  # also for NaN
            raise LoadError(f"{replica}: model {record.version} is {difference:.3g} off its canned scores")


def _refused(replica: Replica, what: str, error: grpc.aio.AioRpcError) -> LoadError:
    said, _, _ = (error.details() or "").partition("\n")
    return LoadError(f"{replica.name} did not {what}: {error.code().name} {said}")
