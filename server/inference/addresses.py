"""The addresses of a name."""

from __future__ import annotations

import asyncio
import socket
from typing import Final

_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)


async def addresses_of(target: str) -> list[str]:
    """The addresses, `host:port`, that the system knows of a `host:port`; raises OSError without any.

    Those of IPv4 where there are such: the others lead to the same servers, which need not listen on them. The system's
    resolver blocks, so it runs in a thread.
    """
    host, _, port = target.rpartition(":")
    found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    hosts = {family: dict.fromkeys(str(one[4][0]) for one in found if one[0] is family) for family in _FAMILIES}
    return [f"{host}:{port}" for host in hosts[socket.AF_INET]] or [
        f"[{host}]:{port}" for host in hosts[socket.AF_INET6]
    ]
