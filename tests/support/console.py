"""`pretrade console` as a process of its own, and a visitor who uses its pages as a browser does, without one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from typing import Any, Final

import httpx

from pretrade.client import credential_variables
from support.harness import PATIENCE_SECONDS
from support.leash import LeashedPopen
from support.secure_server import SecureServer

_ANNOUNCED: Final = re.compile(r"console: (https?://[^/]+/)(?:login\?ticket=(\S+))?")


@dataclass
class RunningConsole:
    """A console that serves."""

    url: str
    """With a slash at the end."""
    ticket: str | None
    """None where the command has no credentials of its own."""
    process: subprocess.Popen[bytes]

    def stop(self) -> int:
        """Ends it as Ctrl-C does; returns its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE_SECONDS)


def clean_environment(server: SecureServer | None = None) -> dict[str, str]:
    """The environment of a console that has no credentials of its own, and trusts a server's authority."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PRETRADE_")}
    return clean if server is None else clean | {credential_variables.CA: str(server.path("ca.pem"))}


@contextmanager
def running_console(environment: Mapping[str, str], *arguments: str) -> Iterator[RunningConsole]:
    """Runs one on a free port; it is killed in the end."""
    argv = [sys.executable, "-m", "local", "console", "--port", "0", *arguments]
    with LeashedPopen(argv, env=dict(environment), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            found = _ANNOUNCED.match(process.stdout.readline().decode())
            assert found is not None, "it says where it is, or why it is not"
            yield RunningConsole(found[1], found[2], process)
        finally:
            process.kill()


class Visitor:
    """A person at a browser: keeps the cookie, sends forms with what the page put into them, and says where it is."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=PATIENCE_SECONDS)
        self._origin = url.rstrip("/")
        self.csrf = ""

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def cookies(self) -> httpx.Cookies:
        return self._client.cookies

    def get(self, path: str, **headers: str) -> httpx.Response:
        answer = self._client.get(path, headers=headers)
        if found := re.search(r'name="csrf" value="([^"]+)"', answer.text):
            self.csrf = unescape(found[1])
        return answer

    def part(self, path: str) -> str:
        """A part of a page, as the page asks for it."""
        answer = self.get(path, **{"hx-request": "true"})
        assert answer.status_code == 200, answer.text
        return answer.text

    @contextmanager
    def stream(self, path: str) -> Iterator[Iterator[tuple[str, Any]]]:
        """The events of a live page: name and content of each."""

        def events() -> Iterator[tuple[str, Any]]:
            name = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield name, json.loads(line.removeprefix("data: "))

        with self._client.stream("GET", path) as answer:
            assert answer.status_code == 200
            yield events()

    def post(self, path: str, fields: Mapping[str, Any] | None = None, **headers: str) -> httpx.Response:
        form = {"csrf": self.csrf, **(fields or {})}
        return self._client.post(path, data=form, headers={"origin": self._origin, **headers})

    def log_in(self, token: str, name: str = "") -> httpx.Response:
        """Logs in, and goes to the first page."""
        answer = self.post("/login", {"token": token, "name": name})
        if answer.status_code == 303:
            self.get("/")
        return answer
