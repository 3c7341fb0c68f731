"""A process that leaves a shared port takes nobody's connection with it. Real servers and sockets."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import closing

import grpc.aio
import psutil
import pytest
from harness import eventually

from server.rpc.ports import _leave

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several processes share a port on Linux only")

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a caller says first, with empty settings."""
SETTINGS, GOAWAY = 4, 7
"""Types of frames."""
GRACE_SECONDS = 2.0


@pytest.fixture
async def listening() -> AsyncIterator[tuple[grpc.aio.Server, int]]:
    server = grpc.aio.server(options=(("grpc.so_reuseport", 1),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield server, port
    await server.stop(None)


def connected(port: int) -> socket.socket:
    """A connection that the server has taken and that has said nothing yet."""
    client = socket.create_connection(("127.0.0.1", port))
    client.settimeout(GRACE_SECONDS)
    ours = client.getsockname()[1]
    eventually(lambda: [one.raddr[1] for one in psutil.Process().net_connections("tcp") if one.raddr], has(ours), 10.0)
    return client


def has(number: int) -> Callable[[list[int]], bool]:
    return lambda found: number in found


def frames(client: socket.socket) -> list[int]:
    """Types of the frames that come until the end of the connection; raises `ConnectionResetError`."""
    read = b""
    while piece := client.recv(4_096):
        read += piece
    found = []
    while read:
        found.append(read[3])
        read = read[9 + int.from_bytes(read[:3], "big") :]
    return found


async def test_a_connection_that_is_being_made_hears_of_the_end_and_is_not_reset(
    listening: tuple[grpc.aio.Server, int],
) -> None:
    server, port = listening
    with closing(connected(port)) as client:
        leaving = asyncio.create_task(_leave(server, port, GRACE_SECONDS))
        await asyncio.sleep(0)  # it has begun
        client.sendall(PREFACE)
        heard = await asyncio.to_thread(frames, client)
        await leaving
    assert {SETTINGS, GOAWAY} <= set(heard)


async def test_a_process_that_leaves_gets_no_further_connections(listening: tuple[grpc.aio.Server, int]) -> None:
    server, port = listening
    files = psutil.Process().num_fds()
    leaving = asyncio.create_task(_leave(server, port, GRACE_SECONDS))
    await asyncio.sleep(0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    await leaving
    assert psutil.Process().num_fds() <= files


async def test_only_what_listens_at_the_port_is_touched(listening: tuple[grpc.aio.Server, int]) -> None:
    server, port = listening
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        leaving = asyncio.create_task(_leave(server, port, GRACE_SECONDS))
        await asyncio.sleep(0)
        with closing(socket.create_connection(other.getsockname())) as client:
            assert client.getpeername() == other.getsockname()
        await leaving
