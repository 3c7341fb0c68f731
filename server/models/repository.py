"""Loads versions through the model repository extension of the Open Inference Protocol, as Triton and MLServer have it.

The extension loads a model by name, not a version of it. Which versions a server then serves is its own policy:

- **MLServer** serves every version whose files are in its repository, and drops those whose files are gone.
- **Triton** serves what the `version_policy` of the model's configuration says: of `config.pbtxt`, or of one that comes
  with the load request and counts instead of that file. With such a configuration (`PRETRADE_OIP__TRITON_CONFIGS`) this
  module names exactly the versions that are to be served, those that are served already among them.

Neither answer of a server is taken for the fact. Triton loads what there is of the versions that it is asked for, and
says that all is well; MLServer's index calls a version READY when another one of the model is. So each version is asked
for by `ModelReady`, and after that, as in TorchServe, for its canned scores.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import grpc
import grpc.aio
import structlog

from pretrade.wire.oip import repository_pb2 as pb
from server.models.management import CALL_SECONDS, LoadError, refused

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from server.inference.oip import OpenInferenceSettings
    from server.inference.replica import Replica

_log = structlog.get_logger(__name__)

_SERVICE: Final = "inference.GRPCInferenceService"
_OLDER_SERVICE: Final = "inference.model_repository.ModelRepositoryService"
"""Where MLServer before 1.4 has the extension."""
_NO_SUCH_VERSION: Final = frozenset(
    (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNKNOWN)
)
"""What servers answer when they are asked for the readiness of what they do not have; MLServer 1.7 says UNKNOWN."""

_Answer = TypeVar("_Answer", bound="Message")


class Repository:
    """The repository API of replicas that speak the Open Inference Protocol; see `Management`.

    Args:
        settings: Names of the versions, and Triton's configurations.
        timeout_seconds: For loading one version.
    """

    tolerance: Final = 1e-5
    """Trees that have their calibration in their leaves round at every leaf, in float32."""

    def __init__(self, settings: OpenInferenceSettings, timeout_seconds: float) -> None:
        self._settings = settings
        self._timeout_seconds = timeout_seconds

    async def loaded(self, channel: grpc.aio.Channel, replica: Replica) -> list[str]:
        """See `Management`; a version that this server knows nothing of has the name that the other end gives it."""
        try:
            served = await self._served(channel, replica.model_name)
        except grpc.aio.AioRpcError:
            return []
        return [replica.codec.version_of(name) for name in served]

    async def load(self, channel: grpc.aio.Channel, replica: Replica, version: str) -> None:
        """See `Management`."""
        name, model = replica.codec.served_name(version), replica.model_name
        try:
            if await _ready(channel, model, name):
                return
            await self._load(channel, model, [*await self._served(channel, model), name])
            if await _ready(channel, model, name):
                return
            reasons = [one.reason for one in await self._index(channel) if (one.name, one.version) == (model, name)]
        except grpc.aio.AioRpcError as error:
            raise refused(replica, f"load {version}", error) from error
        raise LoadError(
            f"{replica.name} loaded {model}, but does not serve version {name}: {''.join(reasons) or 'no reason given'}"
            f" (the version's files must be in its model repository, and the model's version policy must allow it)"
        )

    async def unload(self, channel: grpc.aio.Channel, replica: Replica, version: str) -> None:
        """See `Management`. Where the repository decides, a version goes if its files have left it, and else stays."""
        name, model = replica.codec.served_name(version), replica.model_name
        try:
            if not await _ready(channel, model, name):
                return
            rest = [one for one in await self._served(channel, model) if one != name]
            if rest:
                await self._load(channel, model, rest)
            else:
                request = pb.RepositoryModelUnloadRequest(model_name=model)
                await _call(channel, "RepositoryModelUnload", request, pb.RepositoryModelUnloadResponse)
            if await _ready(channel, model, name):
                _log.info(
                    "version stays loaded, its files are in the repository", replica=replica.name, version=version
                )
        except grpc.aio.AioRpcError as error:
            raise refused(replica, f"unload {version}", error) from error

    async def make_default(self, channel: grpc.aio.Channel, replica: Replica, version: str) -> None:
        """See `Management`: servers of the protocol choose for themselves, and pretrade always names a version."""

    async def _served(self, channel: grpc.aio.Channel, model: str) -> list[str]:
        """The versions of a model that can be asked for, by the server's names, of those that its index has."""
        listed = [one.version for one in await self._index(channel) if one.name == model and one.version]
        return [name for name in listed if await _ready(channel, model, name)]

    async def _index(self, channel: grpc.aio.Channel) -> Sequence[pb.RepositoryIndexResponse.ModelIndex]:
        return (await _call(channel, "RepositoryIndex", pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse)).models

    async def _load(self, channel: grpc.aio.Channel, model: str, names: list[str]) -> None:
        """Loads a model, with the versions that it is to serve where the configuration is ours to give."""
        request = pb.RepositoryModelLoadRequest(model_name=model)
        path = self._settings.triton_configs.get(model)
        if path is not None:
            try:
                policy = {"specific": {"versions": sorted(int(name) for name in names)}}
                config = json.loads(await asyncio.to_thread(path.read_text)) | {"version_policy": policy}
            except (OSError, ValueError, TypeError) as error:
                raise LoadError(f"oip.triton_configs: {model}: {error}") from error
            request.parameters["config"].string_param = json.dumps(config)
        await _call(channel, "RepositoryModelLoad", request, pb.RepositoryModelLoadResponse, self._timeout_seconds)


async def _ready(channel: grpc.aio.Channel, model: str, name: str) -> bool:
    request = pb.ModelReadyRequest(name=model, version=name)
    try:
        return (await _unary(channel, _SERVICE, "ModelReady", request, pb.ModelReadyResponse, CALL_SECONDS)).ready
    except grpc.aio.AioRpcError as error:
        if error.code() in _NO_SUCH_VERSION:
            return False
        raise


async def _call(
    channel: grpc.aio.Channel, method: str, request: Message, answer: type[_Answer], seconds: float = CALL_SECONDS
) -> _Answer:
    """Calls a method of the extension, in whichever service the server has it."""
    try:
        return await _unary(channel, _SERVICE, method, request, answer, seconds)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
            raise
    return await _unary(channel, _OLDER_SERVICE, method, request, answer, seconds)


async def _unary(
    channel: grpc.aio.Channel, service: str, method: str, request: Message, answer: type[_Answer], seconds: float
) -> _Answer:
    call: grpc.aio.UnaryUnaryMultiCallable[Message, _Answer] = channel.unary_unary(
        f"/{service}/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=answer.FromString,
    )
    return await call(request, timeout=seconds)
