"""The cores that a server runs on, where an operator has chosen them.

Everything that decides stays on these cores: the supervisor pins itself, and its processes inherit that, with all
threads of Envoy. What a server starts beside itself, to ship the journal and to read the audit, runs on the machine's
other cores, so that it never takes a core from a decision.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress

_chosen: set[int] = set()
"""Those of this process, once `pin` was called: a process has one set of cores."""


def pin(cores: Collection[int] | None) -> None:
    """Keeps this thread, and the threads and processes that it starts from now on, on some cores.

    Args:
        cores: Their numbers; None changes nothing.

    Raises:
        OSError: This machine has none of them, or the process may use none.
    """
    if cores is None:
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise OSError(f"cannot run on the cores {sorted(cores)} of PRETRADE_CORES: {error.strerror}") from error
    _chosen.update(cores)


def keep_off(pid: int) -> None:
    """Keeps a process off the chosen cores; without any, or where it may use no other, it runs wherever it may."""
    others = set(range(os.cpu_count() or 1)) - _chosen
    if _chosen and others:
        with suppress(OSError):  # it has just ended, or a container has these cores alone
            os.sched_setaffinity(pid, others)
