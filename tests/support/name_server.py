"""A name server with one name, whose address the test changes, and a forwarder that gives a server another address."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_A, _IN, _HEADER = 1, 1, 12


@dataclass
class NameServer:
    """Answers every A query with the address of the moment, and everything else with nothing."""

    address: str | None
    """None: the name exists and has no address."""
    queries: int = 0
    _socket: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    def __enter__(self) -> NameServer:
        self._socket.bind(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def target(self, port: int) -> str:
        """What a client is given to find the name through this server."""
        return f"dns://127.0.0.1:{self._socket.getsockname()[1]}/replica.test:{port}"

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                query, client = self._socket.recvfrom(512)
                self._socket.sendto(self._answer(query), client)

    def _answer(self, query: bytes) -> bytes:
        end = query.index(b"\0", _HEADER) + 5
        question = query[_HEADER:end]
        (kind,) = struct.unpack("!H", question[-4:-2])
        answers = b""
        if kind == _A:
            self.queries += 1
            if self.address is not None:
                # A pointer to the name in the question, then the record with a lifetime of 0 s.
                answers = struct.pack("!HHHIH", 0xC00C, _A, _IN, 0, 4) + socket.inet_aton(self.address)
        return query[:2] + struct.pack("!HHHHH", 0x8180, 1, bool(answers), 0, 0) + question + answers


@contextmanager
def forwarder(host: str, target: str) -> Iterator[list[socket.socket]]:
    """Serves `target` (host:port) at the same port of another address; in the end it is gone, connections included.

    It yields a list that has both ends of each connection that was made here.
    """
    name, port = target.rsplit(":", 1)
    links: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                upstream = socket.create_connection((name, int(port)))
                links.extend((client, upstream))
                for ends in ((client, upstream), (upstream, client)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    with socket.create_server((host, int(port))) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield links
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
    for link in links:
        with suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)
        link.close()
