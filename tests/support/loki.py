"""A stand-in for Loki in one test: its OTLP endpoint, which keeps the lines that it is sent, and can refuse them."""

from __future__ import annotations

import gzip
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.logs.v1 import logs_service_pb2

from support.otlp_collector import values


@dataclass(frozen=True)
class Line:
    """One log record, with where it came from."""

    text: str
    nanoseconds: int
    """When it was written, since 1970."""
    severity: str
    """OpenTelemetry's name: `INFO`, `WARN`, `ERROR`; empty where the line names none."""
    trace_id: str
    resource: dict[str, Any]
    attributes: dict[str, Any]


class Loki:
    """Takes lines at `endpoint`; a context manager.

    Attributes:
        away: While it is set, every line is refused as by a Loki that starts.
    """

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.paths: set[str] = set()
        self.refused = 0
        self.away = threading.Event()
        loki = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if loki.away.is_set():
                    loki.refused += 1
                    self.send_response(503)
                else:
                    loki.paths.add(self.path)
                    packed = self.headers.get("Content-Encoding") == "gzip"
                    loki._take(gzip.decompress(body) if packed else body)
                    self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/otlp"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def texts(self) -> list[str]:
        """What has come, in the order in which it came."""
        return [line.text for line in list(self.lines)]

    def _take(self, body: bytes) -> None:
        asked = logs_service_pb2.ExportLogsServiceRequest.FromString(body)
        for one in asked.resource_logs:
            resource = values(one.resource.attributes)
            for scope in one.scope_logs:
                for record in scope.log_records:
                    self.lines.append(
                        Line(
                            text=record.body.string_value,
                            nanoseconds=record.time_unix_nano,
                            severity=_NAMES.get(record.severity_number, ""),
                            trace_id=record.trace_id.hex(),
                            resource=resource,
                            attributes=values(record.attributes),
                        )
                    )


_NAMES = {5: "DEBUG", 9: "INFO", 13: "WARN", 17: "ERROR", 21: "FATAL"}
