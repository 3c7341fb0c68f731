"""The process that reads the audit for a server: `python -m server.composition.reading_process`.

It is given its `Task` as `server/process/child.py` says, serves on the Unix socket that the task names, and ends with
its parent.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter

import grpc.aio

from server.audit.reading.reading import LISTENING, UNLIMITED, Task
from server.machine import REAL
from server.process.child import take_task
from server.rpc.edge import GrpcEdge
from server.rpc.reading import ReadingServicer
from server.timing.call_deadlines import CallDeadlines

_READ_SECONDS = 60.0
"""How long a request may take to arrive; the parent sends it at once."""


async def serve(task: Task) -> None:
    """Serves until the process ends.

    Raises:
        RuntimeError: The socket cannot be made.
    """
    deadlines = CallDeadlines(REAL.clock, REAL.wall_clock)
    server = grpc.aio.server(interceptors=(GrpcEdge(_READ_SECONDS, Counter(), deadlines),), options=UNLIMITED)
    ReadingServicer(task).add_to(server)
    server.add_insecure_port(f"unix:{task.socket}")
    await server.start()
    sys.stdout.buffer.write(LISTENING)
    sys.stdout.flush()
    os.dup2(2, 1)  # nobody reads the pipe any more, whatever a library prints
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(take_task(Task)))
