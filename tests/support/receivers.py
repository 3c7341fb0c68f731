"""Where notifications arrive in tests: a webhook and a mail server of ours, and an Alertmanager that uses them."""

from __future__ import annotations

import email
import email.policy
import json
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from local.stack.errors import NotReadyError
from local.stack.parts import alertmanager, prometheus
from local.stack.ports import LOOPBACK, free_ports
from support.dashboards import OBSERVABILITY
from support.harness import eventually

CONFIGURATION: Final = OBSERVABILITY / "alertmanager" / "alertmanager.yaml"


class Webhook:
    """A web server that keeps what is posted to it."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.authorizations: set[str | None] = set()
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook.authorizations.add(self.headers["Authorization"])
                webhook.received.append(json.loads(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer((LOOPBACK, 0), Handler)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server.server_port}/"

    def told(self, alert: str) -> list[str]:
        """`firing` or `resolved`, for each notification about an alert, in the order of their arrival."""
        return [one["status"] for one in self.received if one["groupLabels"]["alertname"] == alert]


class Mailbox:
    """A mail server that keeps what it gets: as much of SMTP as a sender needs."""

    def __init__(self) -> None:
        self.received: list[EmailMessage] = []
        mailbox = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self._say("220 mailbox")
                while command := self.rfile.readline().decode().strip().upper():
                    if command == "DATA":
                        self._say("354 go on")
                        lines = list(iter(self.rfile.readline, b".\r\n"))
                        message = email.message_from_bytes(b"".join(lines), policy=email.policy.default)
                        assert isinstance(message, EmailMessage)
                        mailbox.received.append(message)
                    self._say("221 bye" if command == "QUIT" else "250 fine")
                    if command == "QUIT":
                        return

            def _say(self, line: str) -> None:
                self.wfile.write(f"{line}\r\n".encode())

        self.server = socketserver.ThreadingTCPServer((LOOPBACK, 0), Handler)

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.server.server_address[1]}"

    def subjects(self) -> list[str]:
        return [str(message["Subject"]) for message in self.received]


@contextmanager
def serving(*receivers: Webhook | Mailbox) -> Iterator[None]:
    """They take what comes until the context is left."""
    threads = [threading.Thread(target=one.server.serve_forever, args=(0.05,)) for one in receivers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for one, thread in zip(receivers, threads, strict=True):
            one.server.shutdown()
            one.server.server_close()
            thread.join()


@contextmanager
def running_alertmanager(folder: Path, pages: Webhook, tickets: Mailbox) -> Iterator[str]:
    """A real Alertmanager with the configuration of the deployment, and shorter waits; yields its URL.

    Pages go to the webhook, and everything to the mailbox.
    """
    with started_alertmanager(folder, written_configuration(folder, pages, tickets)) as url:
        yield url


@contextmanager
def started_alertmanager(folder: Path, path: Path) -> Iterator[str]:
    """A real Alertmanager with the configuration in a file; yields its URL."""
    if alertmanager.program() is None:
        pytest.skip("needs prometheus-alertmanager (Debian's package)")
    (port,) = free_ports(1)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(alertmanager.argv(port, folder, path), stdout=log, stderr=log)
        try:
            eventually(lambda: _is_ready(port), bool)
            yield alertmanager.url(port)
        finally:
            process.terminate()
            process.wait(30)


def written_configuration(folder: Path, pages: Webhook, tickets: Mailbox) -> Path:
    """The file of the deployment's configuration with these receivers, and shorter waits."""
    path = folder / "alertmanager.yaml"
    path.write_text(yaml.safe_dump(_configuration(folder, pages, tickets)))
    return path


def _is_ready(port: int) -> bool:
    try:
        prometheus.ready(alertmanager.url(port))
    except NotReadyError:
        return False
    return True


def _configuration(folder: Path, pages: Webhook, tickets: Mailbox) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text())
    found["templates"] = [str(CONFIGURATION.parent / "templates" / "*.tmpl")]
    found["global"] = {"smtp_smarthost": tickets.address, "smtp_from": "pretrade@example.com"}
    found["global"] |= {"smtp_require_tls": False, "smtp_hello": "localhost"}
    receivers = {one["name"]: one for one in found["receivers"]}
    (folder / "webhook-token").write_text("the token")
    (web,) = receivers["webhook"]["webhook_configs"]
    web["url"] = pages.url
    web["http_config"]["authorization"]["credentials_file"] = str(folder / "webhook-token")
    found["receivers"] = [receivers[name] for name in ("nobody", "webhook", "e-mail")]
    page, ticket = found["route"]["routes"]
    page["receiver"], ticket["receiver"] = "webhook", "e-mail"
    found["route"]["routes"] = [page | {"continue": True}, page | {"receiver": "e-mail"}, ticket]
    for route in (found["route"], *found["route"]["routes"]):
        route |= {"group_wait": "1s", "group_interval": "1s"}
    return found
