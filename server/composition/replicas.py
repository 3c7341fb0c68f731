"""Opens the replicas, for the composition root."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from server.inference.addresses import addresses_of
from server.inference.codec import TORCHSERVE, Codec, ProtocolName
from server.inference.endpoints import ReplicaName
from server.inference.members import MOST_MEMBERS, Members
from server.inference.model_names import qualified
from server.inference.oip import ModelDescription, OpenInference
from server.inference.pool import Pool, Role
from server.inference.replica import Network, Replica, ReplicaLimits
from server.inference.replicas import Replicas
from server.inference.token import ReplicaToken
from server.process.health import Component
from server.security.client_tls import ClientTls

if TYPE_CHECKING:
    from server.composition.process import Process
    from server.security.settings import ClientTlsSettings
    from server.settings import Settings


async def open_replicas(
    process: Process,
    of_model: str,
    stalled_seconds: Callable[[float], float],
    under_way: Callable[[], int],
    warm_up_turn: asyncio.Lock,
) -> Replicas:
    """Primary, secondary and challenger, and the other challengers.

    Args:
        process: What they are built with; its settings are those of the model.
        of_model: The model that they serve.
        stalled_seconds: How long the event loop has stood still since an instant.
        under_way: Orders that the server is deciding now.
        warm_up_turn: Held while one is warmed up.

    Raises:
        OSError, ValueError: A model that is served by the Open Inference Protocol is not described, or certificates are
            invalid.
    """
    settings, machine = process.settings, process.machine
    endpoints = settings.replicas
    token_files = {qualified(of_model, name): path for name, path in endpoints.token_files.items()}

    management = {qualified(of_model, name): one for name, one in endpoints.managed().items()}

    def made(
        name: str,
        endpoint: str,
        model: str,
        version: str | None,
        codec: Codec,
        tls: ClientTlsSettings | None,
        host: str = "",
    ) -> Replica:
        path = token_files.get(name)
        token = None if path is None else ReplicaToken(name, path, machine.wall_clock)
        return Replica(
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
            network=Network(machine.grpc_channel, machine.dials),
            tls=None if tls is None else ClientTls(name, tls, machine.wall_clock, host),
            warm_up_turn=warm_up_turn,
        )

    async def opened(replica: Replica) -> Replica:
        return await process.stack.enter_async_context(replica)

    async def role(name: ReplicaName, model: str, version: str | None) -> Role:
        codec, tls, each = _codec(settings, name), endpoints.tls.get(name), endpoints.each(name)
        of_role = qualified(of_model, name)
        if not each:
            replicas = [
                await opened(made(qualified(of_model, one), endpoint, model, version, codec, tls))
                for one, endpoint in endpoints.named(name).items()
            ]
            return replicas[0] if len(replicas) == 1 else Pool(of_role, replicas, machine.uniform)
        host, port = each.partition(":")[0], endpoints.management.get(name, "").rpartition(":")[2]

        def member(one: str, address: str) -> Replica:
            if port:
                management[one] = f"{address.rpartition(':')[0]}:{port}"
            return made(one, address, model, version, codec, tls, host)

        pool = Pool(of_role, (), machine.uniform, [f"{of_role}-{number}" for number in range(1, MOST_MEMBERS + 1)])
        await process.background(Members(pool, each, member, addresses_of).run(), f"members of {of_role}")
        return pool

    return Replicas(
        await role("primary", endpoints.champion_model, endpoints.champion_version),
        await role("secondary", endpoints.champion_model, endpoints.champion_version) if endpoints.secondary else None,
        (
            await role("challenger", endpoints.challenger_model, None),
            *[
                await opened(made(name, other.endpoint, other.model, None, TORCHSERVE, other.tls))
                for name, other in endpoints.other_challengers.items()
            ],
        ),
        management=management,
    )


def component_of(role: Role, *, may_rest: bool = False) -> Component:
    """A replica, or several that serve one role, as health sees them.

    Args:
        role: Who serves it.
        may_rest: True for one that need not serve anything before a canary comes.
    """

    def problem() -> str:
        if may_rest and role.model is None and all(one.wanted_version is None for one in endpoints()):
            return ""
        problems = [f"{one.name}: {what}" for one in endpoints() if (what := _problem(one))]
        if not role.several:
            return problems[0].partition(": ")[2] if problems else ""
        if not endpoints():
            return "its name has led to no endpoint yet"
        return f"{len(problems)} of {len(endpoints())}: {'; '.join(problems)}" if problems else ""

    def endpoints() -> tuple[Replica, ...]:
        return (*role.replicas, *role.candidates)

    def warming_up() -> bool:
        return any(replica.healthy and not replica.warm for replica in endpoints())

    return Component(problem, required=False, warming_up=warming_up)


def _problem(replica: Replica) -> str:
    """What is wrong with one endpoint; empty when nothing is."""
    if replica.token is not None and replica.token.problem:
        return replica.token.problem
    if replica.tls is not None and replica.tls.problem:
        return replica.tls.problem
    return replica.ejected if replica.healthy else f"{replica.endpoint} does not answer soundly"


def _codec(settings: Settings, replica: ReplicaName) -> Codec:
    """What a role's endpoints speak."""
    protocol: ProtocolName = getattr(settings.replicas, f"{replica}_protocol")
    if protocol == "torchserve":
        return TORCHSERVE
    description = settings.oip.challenger if replica == "challenger" else settings.oip.champion
    return OpenInference(settings.oip, None if description is None else ModelDescription.read(description))
