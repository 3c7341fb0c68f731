"""`python -m feature_cache.bars`: keeps bars in a database, configured by `PRETRADE_BARS_*` variables."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from contextlib import AbstractContextManager, ExitStack

import structlog
import uvloop
from pydantic import ValidationError

from feature_cache import logs
from feature_cache.bars.keeper import Keeper
from feature_cache.bars.metrics import BarsCollector
from feature_cache.bars.settings import PREFIX, BarsSettings
from feature_cache.bars.store import BarStore, BarStoreError
from feature_cache.described import descriptions
from feature_cache.ending import end
from feature_cache.metrics_http import serve_http


def main() -> int:
    """Keeps bars until SIGTERM or SIGINT; returns 2 when the settings are wrong and 1 when it cannot start."""
    if sys.argv[1:]:
        purposes = descriptions(BarsSettings)
        fields = "\n".join(
            f"  {PREFIX}{name.upper()} ({'needed' if field.is_required() else f'default {field.default!r}'}):"
            f" {purposes[name]}"
            for name, field in BarsSettings.model_fields.items()
        )
        print(__doc__, fields, sep="\n\n")
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    try:
        settings = BarsSettings()  # type: ignore[call-arg]  # from the environment
    except ValidationError as error:
        for problem in error.errors():
            print(f"{PREFIX}{'__'.join(map(str, problem['loc'])).upper()}: {problem['msg']}", file=sys.stderr)
        return 2
    logs.configure(settings.log_level, "bars")
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    store = BarStore(settings.database_url.get_secret_value())
    try:
        hypertable = store.prepare()
    except BarStoreError as error:
        structlog.get_logger(__name__).error("bars.cannot_start", error=str(error))
        return 1
    structlog.get_logger(__name__).info("bars.started", topic=settings.kafka_topic, hypertable=hypertable)
    keeper = Keeper(settings, store)
    with ExitStack() as stack:
        stack.callback(store.close)
        if settings.metrics_port:
            try:
                stack.enter_context(_served(keeper, settings))
            except OSError as error:
                structlog.get_logger(__name__).error("bars.cannot_start", error=str(error))
                return 1
        uvloop.run(_run(keeper))
    return 0


def _served(keeper: Keeper, settings: BarsSettings) -> AbstractContextManager[int]:
    def problem() -> str | None:
        return keeper.problem

    return serve_http(settings.metrics_host, settings.metrics_port, BarsCollector(keeper), problem, problem)


async def _run(keeper: Keeper) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    running = asyncio.create_task(keeper.run())
    await stopped.wait()
    await end([running])


if __name__ == "__main__":
    sys.exit(main())
