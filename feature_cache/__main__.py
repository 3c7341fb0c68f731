"""`python -m feature_cache`: the feature worker, configured by `PRETRADE_WORKER_*` variables."""

from __future__ import annotations

import logging
import sys

import structlog
import uvloop
from pydantic import SecretStr, ValidationError

from feature_cache import kafka, logs
from feature_cache.described import descriptions
from feature_cache.worker.settings import PREFIX, WorkerSettings, load
from feature_cache.worker.worker import serve


def main() -> int:
    """Runs the worker; returns 2 when the settings are wrong and 1 when it cannot start."""
    if sys.argv[1:]:
        fields = "\n".join(
            f"  {prefix}{name.upper()} (default {_shown(field.default)!r}): {descriptions(section)[name]}"
            for prefix, section in ((PREFIX, WorkerSettings), (kafka.PREFIX, kafka.KafkaSecurity))
            for name, field in section.model_fields.items()
        )
        print(__doc__, fields, sep="\n\n")
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    try:
        settings = load()
    except ValidationError as error:
        for problem in error.errors():
            print(f"{PREFIX}{'__'.join(map(str, problem['loc'])).upper()}: {problem['msg']}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure(settings.log_level, "worker")
    # During an outage aiokafka writes several lines for every attempt; the worker says once what matters.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    try:
        uvloop.run(serve(settings))
    except OSError as error:
        structlog.get_logger(__name__).error("worker.cannot_start", error=str(error))
        return 1
    return 0


def _shown(default: object) -> object:
    """A default, which is no secret even where the setting is one."""
    return default.get_secret_value() if isinstance(default, SecretStr) else default


if __name__ == "__main__":
    sys.exit(main())
