"""Opens the replicas, for the composition root."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from server.inference.codec import TORCHSERVE, Codec, ProtocolName
from server.inference.oip import ModelDescription, OpenInference
from server.inference.replica import Replica, ReplicaLimits
from server.inference.token import ReplicaToken
from server.process.health import Component
from server.security.client_tls import ClientTls

if TYPE_CHECKING:
    from server.composition.process import Process
    from server.settings import Settings


async def open_replicas(
    process: Process, stalled_seconds: Callable[[float], float], under_way: Callable[[], int]
) -> tuple[Replica, ...]:
    """Primary, secondary and challenger, and the other challengers.

    Args:
        process: What they are built with.
        stalled_seconds: How long the event loop has stood still since an instant.
        under_way: Orders that the server is deciding now.

    Raises:
        OSError, ValueError: A model that is served by the Open Inference Protocol is not described, or certificates are
            invalid.
    """
    settings, machine = process.settings, process.machine
    endpoints = settings.replicas
    warm_up_turn = asyncio.Lock()
    token_files = {str(name): path for name, path in endpoints.token_files.items()}

    async def opened(name: str, endpoint: str, model: str, version: str | None) -> Replica:
        codec = TORCHSERVE if name in endpoints.other_challengers else _codec(settings, name)
        path = token_files.get(name)
        other = endpoints.other_challengers.get(name)
        tls = {str(of): one for of, one in endpoints.tls.items()}.get(name) if other is None else other.tls
        token = None if path is None else ReplicaToken(name, path, machine.wall_clock)
        replica = Replica(
            name,
            endpoint,
            model,
            version,
            ReplicaLimits(settings.replica, settings.batcher, settings.breaker),
            clock=machine.clock,
            random=machine.uniform,
            stalled_seconds=stalled_seconds,
            under_way=under_way,
            codec=codec,
            token=token,
            open_channel=machine.grpc_channel,
            tls=None if tls is None else ClientTls(name, tls, machine.wall_clock),
            warm_up_turn=warm_up_turn,
        )
        return await process.stack.enter_async_context(replica)

    return (
        await opened("primary", endpoints.primary, endpoints.champion_model, endpoints.champion_version),
        await opened("secondary", endpoints.secondary, endpoints.champion_model, endpoints.champion_version),
        await opened("challenger", endpoints.challenger, endpoints.challenger_model, None),
        *[await opened(name, other.endpoint, other.model, None) for name, other in endpoints.other_challengers.items()],
    )


def component_of(replica: Replica) -> Component:
    """A replica as health sees it."""

    def problem() -> str:
        if replica.token is not None and replica.token.problem:
            return replica.token.problem
        if replica.tls is not None and replica.tls.problem:
            return replica.tls.problem
        return "" if replica.healthy else f"{replica.endpoint} does not answer soundly"

    return Component(problem, required=False, warming_up=lambda: replica.healthy and not replica.warm)


def _codec(settings: Settings, replica: str) -> Codec:
    """What a replica speaks."""
    protocol: ProtocolName = getattr(settings.replicas, f"{replica}_protocol")
    if protocol == "torchserve":
        return TORCHSERVE
    description = settings.oip.challenger if replica == "challenger" else settings.oip.champion
    assert description is not None
    return OpenInference(settings.oip, ModelDescription.read(description))
