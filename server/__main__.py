"""`python -m server`: the decision server, configured by `PRETRADE_*` variables.

`--processes N` runs N server processes on the same ports: SIGHUP replaces them one by one without losing a call.
SIGTERM drains; a second one ends at once. `--help` lists the settings.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

import structlog
import uvloop
from pydantic import ValidationError

from feature_cache import logs
from server import reference
from server.composition.app import serve
from server.composition.process import ComponentEndedError
from server.composition.supervision import supervise
from server.control.flags import FlagProviderError
from server.errors import AuditError
from server.process import huge_pages
from server.process.cores import pin
from server.process.slot import Slot
from server.process.stopping import Leash
from server.settings import Settings, load, problems_of

_log = structlog.get_logger(__name__)


def main() -> int:
    """Runs the server; returns 2 when the settings are wrong and 1 when it cannot start."""
    arguments = _parser().parse_args()
    # Whatever the server or a child of it writes (journal, control state, database, sockets) is for its own user alone.
    os.umask(0o077)
    leash = None if arguments.slot is None else Leash()
    if arguments.processes is not None:
        os.environ["PRETRADE_PROCESSES"] = arguments.processes
    try:
        settings = load()
    except ValidationError as error:
        print(*problems_of(error), sep="\n", file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure(settings.log_level, "server")
    if settings.without_envoy:
        _log.info("Envoy cannot run here, so grpc.aio serves", problem=settings.without_envoy)
    huge_pages.keep_out()
    try:
        return _run(settings, arguments, leash)
    except (OSError, AuditError, FlagProviderError) as error:
        _log.error("cannot start", error=str(error))
        return 1
    except ComponentEndedError as error:
        _log.critical("stopped", error=str(error))
        return 1


def _run(settings: Settings, arguments: argparse.Namespace, leash: Leash | None) -> int:
    if settings.processes is not None and arguments.slot is None:
        pin(settings.cores)
        return asyncio.run(supervise(settings))
    slot = None
    if arguments.slot is not None:
        processes = settings.processes or 1
        slot = Slot(arguments.slot, processes, arguments.sockets, arguments.restarts, arguments.keys)
        structlog.contextvars.bind_contextvars(process=slot.index)
    uvloop.run(serve(settings, slot, leash))
    return 0


class _Parser(argparse.ArgumentParser):
    """Gathers what there is to say of each setting when somebody asks, and not at each start."""

    def format_help(self) -> str:
        self.epilog = "\n".join(f"{name}\n    {text} [{default}]" for name, default, text in reference.settings())
        return super().format_help()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", metavar="N", help="server processes on the same ports (PRETRADE_PROCESSES)")
    # How the supervisor starts its children.
    parser.add_argument("--slot", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--restarts", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--keys", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sockets", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
