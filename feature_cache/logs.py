"""Structured logs: one JSON object a line on standard error, or readable lines on a terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import stat
import sys
from typing import Final, TextIO, cast

import structlog

_PIECE: Final = select.PIPE_BUF // 4
"""Characters that are PIPE_BUF bytes at most."""


class _Unfailing(io.TextIOBase):
    """A stream that drops what cannot be written, or not at once.

    Neither a full disk nor a reader of our output who stopped reading may fail or delay a decision.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._poll: select.poll | None = None
        self.dropped = 0
        """Texts that were."""
        with contextlib.suppress(OSError):
            number = stream.fileno()
            if stat.S_ISFIFO(os.fstat(number).st_mode):
                self._poll = select.poll()
                self._poll.register(number, select.POLLOUT)

    def write(self, text: str) -> int:
        try:
            if self._poll is None:
                self._stream.write(text)
            else:
                self._write_to_pipe(text, self._poll)
        except OSError:
            self.dropped += 1
        return len(text)

    def _write_to_pipe(self, text: str, poll: select.poll) -> None:
        """A pipe that is ready takes PIPE_BUF bytes without waiting, and as one; what is longer goes in pieces."""
        piece = len(text) if len(text.encode(errors="replace")) <= select.PIPE_BUF else _PIECE
        for start in range(0, len(text), piece):
            if not poll.poll(0):
                self.dropped += 1
                return
            self._stream.write(text[start : start + piece])
            self._stream.flush()

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def configure(level: str, component: str) -> None:
    """Sets up logging for this process.

    Args:
        level: `debug`, `info`, `warning` or `error`.
        component: Goes into every line.
    """
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )

    def name_component(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        # Not bound to the context, which the threads of libraries do not have.
        event.setdefault("component", component)
        return event

    shared: list[structlog.typing.Processor] = [
        name_component,
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    stream = cast("TextIO", _Unfailing(sys.stderr))
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # One write a line, so that the lines of several processes do not mix.
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    # What libraries log becomes lines of the same kind.
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
