"""The decision server inside Envoy's process: the ASGI application that `server/envoy/edge.py` has Envoy load.

The ASGI lifespan is the server's lifetime. The application writes a line to standard output when it is ready. It drains
when its standard input ends or a SIGTERM comes, as a process of `python -m server --slot` does, and then ends Envoy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import structlog

from feature_cache import logs
from server.composition.app import Server, started
from server.envoy.edge import Embedding, EnvoyEdge
from server.http.asgi import Receive, Scope, Send
from server.process.slot import Slot
from server.process.stopping import Leash
from server.settings import load

_log = structlog.get_logger(__name__)


class _Application:
    """Starts and ends the server with Envoy, and hands it the calls."""

    def __init__(self) -> None:
        self._leash = Leash()
        self._embedding = Embedding.take()
        self._edge = EnvoyEdge(self._embedding.admin, Path(self._embedding.secrets))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            assert self._edge.application is not None, "no call comes before the start is complete"
            await self._edge.application(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        settings = load()
        logs.configure(settings.log_level, "server")
        told = self._embedding
        slot = Slot(told.slot, settings.processes or 1, Path(told.sockets), told.restarts, told.keys)
        structlog.contextvars.bind_contextvars(process=slot.index)
        stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        async with AsyncExitStack() as stack:
            try:
                server = await stack.enter_async_context(started(settings, slot, self._leash, stop, self._edge))
            except Exception as error:
                _log.error("cannot start", error=str(error))
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            await send({"type": "lifespan.startup.complete"})
            try:
                await self._serve(server, stop, stack, asyncio.ensure_future(receive()))
            except Exception as error:
                _log.critical("stopped", error=repr(error))
                os._exit(1)
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(
        self, server: Server, stop: asyncio.Future[None], stack: AsyncExitStack, shut_down: asyncio.Future[Any]
    ) -> None:
        """Serves until it is stopped, and after that until Envoy is about to end."""
        _stop_on_sigterm(stop)
        if not await server.run(stop, shut_down):
            _log.warning("Envoy was asked to end, not draining")
            return
        await stack.aclose()
        stop.result()
        await self._edge.end()
        await shut_down


def _stop_on_sigterm(stop: asyncio.Future[None]) -> None:
    """Resolves the future on SIGTERM, which is blocked in all of Envoy's threads: one of ours waits for it."""
    loop = asyncio.get_running_loop()

    def end() -> None:
        if not stop.done():
            stop.set_result(None)

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        with contextlib.suppress(RuntimeError):  # the loop has ended before
            loop.call_soon_threadsafe(end)

    threading.Thread(target=wait, name="sigterm", daemon=True).start()


application = _Application()
