"""A process with a journal of its own, for tests that kill it or break its disk.

It appends decisions from 16 tasks until it is killed, and writes one line per event to standard output: `+<id>`
durable, `-<id>` refused, `writable` after an outage. Its arguments are the journal, the database to ship to or an empty
string, and a prefix for the ids. A line on standard input changes the disk: `limit <bytes>` caps the size of every file
that it writes, `unlimit` lifts that.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from feature_cache.logs import configure
from pretrade.audit.v1 import packet_pb2
from server.audit.shipping.shipper import Shipper
from server.audit.shipping.shipping import ShippingSettings
from server.errors import JournalError
from server.journal.journal import Journal, JournalSettings

APPENDERS = 16


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


async def main(path: str, database_url: str, prefix: str) -> None:
    configure("info", "audit-child")  # to standard error, away from the events
    loop = asyncio.get_running_loop()
    loop.add_reader(0, apply)
    ids = itertools.count()
    async with AsyncExitStack() as stack:
        settings = JournalSettings(path=Path(path), retry_min_seconds=0.01, retry_max_seconds=0.05)
        journal = await stack.enter_async_context(Journal(settings))
        if database_url:
            shipper = Shipper(journal, database_url, ShippingSettings(retained_rows=100))
            journal.on_full((await stack.enter_async_context(shipper)).trim)

        async def append() -> None:
            for i in ids:
                packet = packet_pb2.JournalEntry()
                packet.decision.decision.decision_id = decision_id = f"{prefix}-{i}"
                packet.decision.model_input = bytes(400)
                try:
                    await journal.append(packet.SerializeToString())
                except JournalError:
                    say(f"-{decision_id}")
                    while not journal.writable:  # noqa: ASYNC110 - plain attribute, set by the writer's thread
                        await asyncio.sleep(0.005)
                    say("writable")
                else:
                    say(f"+{decision_id}")

        async with asyncio.TaskGroup() as group:
            for _ in range(APPENDERS):
                group.create_task(append())


def apply() -> None:
    """Changes the limit on the size of files."""
    command, *arguments = sys.stdin.readline().split()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(arguments[0]) if command == "limit" else hard, hard))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
