"""A real browser without a window, and the pages that tests have it open."""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest

from support.leash import LeashedPopen

_PROGRAMS: Final = ("chromium", "chromium-browser", "google-chrome")
_SECONDS: Final = 90.0
"""A browser has taken 10 s to start beside other work."""


@pytest.fixture(scope="session")
def browser() -> str:
    """The path of a Chromium."""
    for name in _PROGRAMS:
        if (found := shutil.which(name)) is not None:
            return found
    pytest.skip("needs chromium or google-chrome")


class Site:
    """A site on loopback with the files of a folder, whose pages tell it what they found by a POST to `/said`.

    Args:
        folder: Its files.
        pages: Those that are no files, by path: HTML.
    """

    def __init__(self, folder: Path, pages: Mapping[str, str]) -> None:
        said: queue.Queue[Any] = queue.Queue()

        class Handler(SimpleHTTPRequestHandler):
            extensions_map = SimpleHTTPRequestHandler.extensions_map | {".js": "text/javascript"}

            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments, directory=str(folder))

            def do_GET(self) -> None:
                page = pages.get(self.path.partition("?")[0])
                if page is None:
                    super().do_GET()
                else:
                    self._answer(page.encode())

            def do_POST(self) -> None:
                said.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self._answer(b"")

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/html; charset=utf-8")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  its name in the library
                """The tests' output is no log."""

        self._said = said
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Answers until the end of the block."""
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def said_in(self, browser: str, path: str, profile: Path) -> Any:
        """What a page tells that is opened in a browser.

        Args:
            browser: Its path.
            path: Of the page.
            profile: A folder for what the browser writes.
        """
        argv = [
            browser,
            "--headless=new",
            "--no-sandbox",  # tests may be root, for whom it has none
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--no-proxy-server",
            f"--user-data-dir={profile}",
            f"{self.origin}{path}",
        ]
        log = profile.with_suffix(".log")
        with log.open("wb") as output, LeashedPopen(argv, stdout=output, stderr=output) as process:
            try:
                return self._said.get(timeout=_SECONDS)
            except queue.Empty:
                raise AssertionError(f"the page said nothing: {log.read_text(errors='replace')[-2_000:]}") from None
            finally:
                process.terminate()
                process.wait(_SECONDS)
