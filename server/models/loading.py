"""Loads model versions into a running model server, and checks each before it may decide orders.

How that is done is a matter of the server's protocol: `management.py` for TorchServe, `repository.py` for the Open
Inference Protocol. A version is loaded beside the others, under the name that the replica is asked for; requests name
the version that they mean. It is then warmed up and asked for its canned scores, which must be those it gave when it
was exported. Every step can be repeated: what is done already stays as it is.

A replica's management service may be a name with several addresses, such as a headless Service of Kubernetes. Every
step is done at each of them, since the connection that decides orders may lead to any.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import grpc.aio
import numpy as np
import structlog

from feature_cache.feature_set import ROW
from server.inference import model_sets, wire
from server.inference.addresses import addresses_of
from server.inference.oip import OpenInferenceSettings
from server.inference.outcome import BatchFailedError
from server.inference.token import ManagementToken
from server.inference.wire import ModelIdentity
from server.models.management import LoadError, Management, TorchServeManagement
from server.models.registry import ModelRecord, ModelUnusableError
from server.models.repository import Repository

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from server.inference.codec import ProtocolName
    from server.inference.replica import Replica

_log = structlog.get_logger(__name__)

_WARM_UP_ROWS: Final = (1, 16, 64, 256)
_WARM_UP_ROUNDS: Final = 5
_AGAIN_SECONDS: Final = 0.2


class ModelLoader:
    """Loads versions into replicas.

    Args:
        management: `host:port` of each replica's gRPC management service, by the replica's name. A replica that is not
            named is only checked; the server loads nothing into it.
        archive_url: Where TorchServe finds a version; holds `{version}`.
        timeout_seconds: For one version and replica.
        resolve: The addresses, `host:port`, of a `host:port`; raises OSError.
        oip: Of replicas that speak the Open Inference Protocol; None for the defaults.
    """

    def __init__(
        self,
        management: Mapping[str, str],
        archive_url: str,
        timeout_seconds: float,
        resolve: Callable[[str], Awaitable[list[str]]] | None = None,
        oip: OpenInferenceSettings | None = None,
    ) -> None:
        self._managements: dict[ProtocolName, Management] = {
            "torchserve": TorchServeManagement(archive_url, timeout_seconds),
            "oip": Repository(oip or OpenInferenceSettings(), timeout_seconds),
        }
        self._management = management
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
        replica.codec.learn(identity_of(record, replica.model_name))
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
            LoadError: The server refuses, or cannot be reached.
        """
        if not self.manages(replica.name):
            return
        for address in await self._addresses(replica):
            async with self._channel(replica, address) as channel:
                await self._management_of(replica).unload(channel, replica, version)
        _log.info("model unloaded", replica=replica.name, version=version)

    async def make_default(self, replica: Replica, version: str) -> None:
        """Has requests that name no version answered by this one, those of other clients and of people.

        Raises:
            LoadError: The server refuses, or cannot be reached.
        """
        if not self.manages(replica.name):
            return
        for address in await self._addresses(replica):
            async with self._channel(replica, address) as channel:
                await self._management_of(replica).make_default(channel, replica, version)

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
        async with self._channel(replica, address) as channel:
            return await self._management_of(replica).loaded(channel, replica)

    def _management_of(self, replica: Replica) -> Management:
        return self._managements[replica.codec.protocol]

    def _channel(self, replica: Replica, address: str) -> grpc.aio.Channel:
        shown = None if replica.token is None else (ManagementToken(replica.token),)
        if replica.tls is None:
            return grpc.aio.insecure_channel(address, interceptors=shown)
        # What was looked up is an address; the certificate has the name.
        host = self._management[replica.name].rpartition(":")[0].strip("[]")
        return replica.tls.channel(address, interceptors=shown, host=host)

    async def _register(self, replica: Replica, version: str) -> None:
        for address in await self._addresses(replica):
            if version in await self._loaded_at(replica, address):
                continue
            async with self._channel(replica, address) as channel:
                await self._management_of(replica).load(channel, replica, version)

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
        _compare(replica.name, record, answer, self._management_of(replica).tolerance)


def identity_of(record: ModelRecord, name: str) -> ModelIdentity:
    """What a version says of itself, as an answer of a model called `name` carries it."""
    return ModelIdentity(name, record.version, float(np.float32(record.threshold)), record.expires_at, record.features)


def _compare(replica: str, record: ModelRecord, answer: wire.ScoreBatch, tolerance: float) -> None:
    """Raises `LoadError` unless the answer is that of the version."""
    if answer.model.threshold != np.float32(record.threshold):
        raise LoadError(f"{replica}: model {record.version} has threshold {answer.model.threshold}")
    if len(record.canned_scores):
        difference = float(np.max(np.abs(answer.scores - record.canned_scores)))
        if not difference <= tolerance:  # also for NaN
            raise LoadError(f"{replica}: model {record.version} is {difference:.3g} off its canned scores")
