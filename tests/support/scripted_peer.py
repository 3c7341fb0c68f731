"""A model server over real HTTP/2 whose every answer the test decides: for answers that TorchServe never gives.

`tests/contract/test_torchserve_outcomes.py` compares its sound answers with those of the real TorchServe.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from typing import Final, Self

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import numpy as np

from feature_cache import features
from feature_cache.features import MF1
from pretrade.wire.torchserve import inference_pb2

_CHUNK_BYTES: Final = 65_536
_HEADER: Final = struct.Struct("<4sI8sfIQ")
_GARBAGE: Final = bytes(range(256)) * 4
VERSION: Final = "5c" * 8
"""Version of the model that `scored` claims to be."""


class PeerCall:
    """One `Predictions` call, to be answered by the script or not."""

    def __init__(self, connection: _Connection, stream_id: int, request: inference_pb2.PredictionsRequest) -> None:
        self._connection = connection
        self._stream_id = stream_id
        self.request = request

    @property
    def rows(self) -> int:
        """Rows in the request."""
        return len(self.request.input["input"]) // MF1.row_bytes

    @property
    def is_probe(self) -> bool:
        """True for the canned row of a health probe."""
        return self.request.input["input"] == bytes(MF1.row_bytes)

    def reply(self, prediction: bytes) -> None:
        """A whole answer with status OK."""
        self.headers()
        self.data(_framed(prediction))
        self.status(0, "")

    def status(self, code: int, message: str) -> None:
        """Ends the call with a gRPC status; without `headers` before it, a response of trailers only."""
        trailers = [("grpc-status", str(code)), ("grpc-message", message)]
        if self._stream_id not in self._connection.answered:
            trailers = [(":status", "200"), ("content-type", "application/grpc"), *trailers]
        self._connection.h2.send_headers(self._stream_id, trailers, end_stream=True)
        self._connection.flush()

    def headers(self) -> None:
        """The beginning of an answer."""
        self._connection.answered.add(self._stream_id)
        self._connection.h2.send_headers(
            self._stream_id, [(":status", "200"), ("content-type", "application/grpc")], end_stream=False
        )
        self._connection.flush()

    def data(self, payload: bytes) -> None:
        """A piece of an answer, as large as it is."""
        connection, left = self._connection, memoryview(payload)
        while left:
            room = min(connection.h2.local_flow_control_window(self._stream_id), connection.h2.max_outbound_frame_size)
            if room == 0:
                if not connection.receive():
                    return
                continue
            connection.h2.send_data(self._stream_id, bytes(left[:room]))
            connection.flush()
            left = left[room:]

    def half_reply(self, prediction: bytes) -> None:
        """The first half of an answer; the rest never comes."""
        self.headers()
        framed = _framed(prediction)
        self.data(framed[: len(framed) // 2])

    def reset(self) -> None:
        """Resets the stream (RST_STREAM), whatever was sent of it."""
        self._connection.h2.reset_stream(self._stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)
        self._connection.flush()

    def go_away(self) -> None:
        """Ends the connection (GOAWAY) and says that this call was not processed."""
        self._connection.h2.close_connection(h2.errors.ErrorCodes.NO_ERROR, last_stream_id=0)
        self._connection.flush()
        self._connection.close()

    def garbage(self) -> None:
        """Bytes that are no HTTP/2 frames."""
        self._connection.send(_GARBAGE)

    def hang_up(self) -> None:
        """Closes the connection without a word."""
        self._connection.close()


Script = Callable[[PeerCall], None]


def scored(rows: int, scores: list[float] | float = 0.9, *, version: str = VERSION, threshold: float = 0.5) -> bytes:
    """A sound prediction: the header of our handler and one score a row."""
    values = np.full(rows, scores, dtype="<f4") if isinstance(scores, float) else np.array(scores, dtype="<f4")
    header = _HEADER.pack(b"PTS1", rows, bytes.fromhex(version), threshold, features.MF1.fingerprint, 0)
    return header + values.tobytes()


def _framed(prediction: bytes) -> bytes:
    message = inference_pb2.PredictionResponse(prediction=prediction).SerializeToString()
    return struct.pack(">BI", 0, len(message)) + message


class ScriptedPeer:
    """Listens on a free port of the loopback interface; `script` is called for every call, in its connection's thread.

    A script that returns without a word leaves its call without an answer. `script` may be replaced at any time.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.calls = 0
        """`Predictions` calls received, probes included."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[_Connection] = []
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, name="scripted-peer", daemon=True)

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._accepting.join()
        self._listener.close()
        for connection in self._connections:
            connection.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                opened, _ = self._listener.accept()
            except OSError:
                return
            connection = _Connection(self, opened)
            self._connections.append(connection)
            thread = threading.Thread(target=connection.run, name="scripted-peer-connection", daemon=True)
            self._threads.append(thread)
            thread.start()


class _Connection:
    """One client's connection, used by one thread but for `close`."""

    def __init__(self, peer: ScriptedPeer, opened: socket.socket) -> None:
        self._peer = peer
        self._socket = opened
        self._bodies: dict[int, bytearray] = {}
        self.answered: set[int] = set()
        """Streams whose headers were sent."""
        # Broken on purpose now and then: our own end must not object.
        config = h2.config.H2Configuration(
            client_side=False, validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.h2 = h2.connection.H2Connection(config)

    def run(self) -> None:
        """Serves until either side ends the connection."""
        try:
            self.h2.initiate_connection()
            self.flush()
            while self.receive():
                pass
        except (OSError, h2.exceptions.ProtocolError):
            pass  # the client has gone, or cannot make sense of what the script sent
        finally:
            self._socket.close()

    def receive(self) -> bool:
        """Takes up what the client sent; False at its end."""
        received = self._socket.recv(_CHUNK_BYTES)
        if not received:
            return False
        for event in self.h2.receive_data(received):
            match event:
                case h2.events.DataReceived():
                    assert event.stream_id is not None
                    assert event.data is not None
                    self._bodies.setdefault(event.stream_id, bytearray()).extend(event.data)
                    if event.flow_controlled_length:
                        self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                case h2.events.StreamEnded():
                    assert event.stream_id is not None
                    self._call(event.stream_id)
                case _:
                    pass
        self.flush()
        return True

    def _call(self, stream_id: int) -> None:
        body = bytes(self._bodies.pop(stream_id, b""))
        request = inference_pb2.PredictionsRequest.FromString(body[5:])
        self._peer.calls += 1
        self._peer.script(PeerCall(self, stream_id, request))

    def flush(self) -> None:
        """Sends what HTTP/2 has to say."""
        self.send(self.h2.data_to_send())

    def send(self, payload: bytes) -> None:
        """Sends bytes, frames or not."""
        self._socket.sendall(payload)

    def close(self) -> None:
        """Ends the connection; its thread ends."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended already
