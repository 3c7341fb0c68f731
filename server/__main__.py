"""`python -m server`: the decision server, configured by `PRETRADE_*` variables."""

from __future__ import annotations

import gc
import sys

import structlog
import uvloop
from pydantic import ValidationError

from feature_cache import logs
from server import reference
from server.app import ComponentEndedError, serve
from server.audit.errors import AuditError
from server.settings import load

_log = structlog.get_logger(__name__)


def main() -> int:
    """Runs the server; returns 2 when the settings are wrong and 1 when it cannot start."""
    if sys.argv[1:]:
        print(__doc__, _settings_help(), sep="\n\n")
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    try:
        settings = load()
    except ValidationError as error:
        for problem in error.errors():
            name = "__".join(map(str, problem["loc"])).upper()
            print(f"PRETRADE_{name}: {problem['msg']}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure(settings.log_level, "server")
    # What start-up leaves behind lives as long as the process; the collector need not look at it again.
    gc.freeze()
    try:
        uvloop.run(serve(settings))
    except (OSError, AuditError) as error:
        _log.error("cannot start", error=str(error))
        return 1
    except ComponentEndedError as error:
        _log.critical("stopped", error=str(error))
        return 1
    return 0


def _settings_help() -> str:
    return "\n".join(f"{name}\n    {text} [{default}]" for name, default, text in reference.settings())


if __name__ == "__main__":
    sys.exit(main())
