"""Keeps huge pages out of the processes of a server.

The kernel makes a huge page by copying 512 small ones. Until that is done no other thread of the process can map,
release or first touch a page, which takes 5 ms on our machine. Envoy's allocator asks for it once a second, where that
is worth it (`madvise(MADV_COLLAPSE)`), and some seconds after the first orders for twenty pages in a row: no order was
answered for 75 to 120 ms.

Source: https://docs.kernel.org/admin-guide/mm/transhuge.html; `man 2 PR_SET_THP_DISABLE`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

import structlog

_log = structlog.get_logger(__name__)

_PR_SET_THP_DISABLE: Final = 41
_UNUSED: Final = ctypes.c_ulong(0)


def keep_out() -> None:
    """Does so for this process, and all that it starts from now on.

    Where the kernel refuses, the server runs all the same.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_THP_DISABLE, ctypes.c_ulong(1), _UNUSED, _UNUSED, _UNUSED):
        _log.info("huge pages cannot be kept out", error=os.strerror(ctypes.get_errno()))
