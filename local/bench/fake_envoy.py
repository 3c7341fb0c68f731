"""An Envoy of one worker thread for the lane's filter: the worker is whoever calls these methods.

Tests hold the filter against it, and the benchmark of the decision path drives the lane with it. It needs what compiles
the filter, and is there in a checkout of the repository alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from feature_cache.compiled import compiled
from server.envoy.lane import DECIDE

_SOURCE: Final = Path(__file__).with_suffix(".c")
_HOOKS: Final = ("new", "request_headers", "request_body", "request_trailers", "scheduled", "destroy")
"""In the order of the C structure."""
LANE: Final = "server.envoy.lane_c"
GO_ON, STOP, DROP = 0, 1, 3
"""What the filter says: to the next filter; held back; and taken, nothing goes to the next one."""
PLAIN: Final = {
    ":method": "POST",
    ":scheme": "http",
    ":path": DECIDE,
    ":authority": "here:7001",
    "te": "trailers",
    "content-type": "application/grpc",
    "x-pretrade-arrived": "1790000000.000001",
}
"""The headers of a plain call."""


class Request:
    """A call as Envoy holds it."""

    def __init__(self, fake: ctypes.CDLL, request: int) -> None:
        self._fake = fake
        self._request = ctypes.c_void_p(request)

    def headers(self, end: bool = False) -> int:
        """They are there: what the filter says."""
        return int(self._fake.fake_headers(self._request, end))

    def body(self, data: bytes, piece: int = 1_000_000, end: bool = True) -> int:
        """More of the body is there, in pieces of so many bytes: what the filter says."""
        return int(self._fake.fake_body(self._request, data, len(data), piece, end))

    def trailers(self) -> int:
        """They are there: what the filter says."""
        return int(self._fake.fake_trailers(self._request))

    def leave(self, after: int = 0) -> None:
        """The caller goes: now, or while so many parts of the answer are sent."""
        if after:
            self._fake.fake_leaves_after(self._request, after)
        else:
            self._fake.fake_leave(self._request)

    def hold(self, held: bool = True) -> None:
        """The worker stands still where it sends the answer, until it is not held any more."""
        self._fake.fake_hold(self._request, held)

    @property
    def stands(self) -> bool:
        """Whether the worker has stood there."""
        return bool(self._fake.fake_stands(self._request))

    def takes_along(self, other: Request) -> None:
        """The caller of another call, which is not forgotten before this one, goes whenever this one ends."""
        self._fake.fake_takes_along(self._request, other._request)

    @property
    def went_on(self) -> bool:
        """Whether the filter had what it held back go to the next one."""
        return bool(self._fake.fake_went_on(self._request))

    @property
    def is_there(self) -> bool:
        """Whether it has not ended."""
        return bool(self._fake.fake_is_there(self._request))

    @property
    def sent(self) -> list[tuple[str, bytes]]:
        """What was sent: `H` headers, `D` data and `T` trailers, or `E` headers that end it."""
        into = ctypes.create_string_buffer(65_536)
        size = self._fake.fake_sent(self._request, into)
        left = into.raw[:size]
        parts = []
        while left:
            kind, size = struct.unpack_from("=cI", left)
            parts.append((kind.decode(), left[5 : 5 + size]))
            left = left[5 + size :]
        return parts

    def forget(self) -> None:
        """It is over for Envoy."""
        self._fake.fake_forget(self._request)


class Burst:
    """Plain calls that come at once, again and again.

    Args:
        fake: The library.
        headers: Of each call.
        bodies: One of each call.
    """

    def __init__(self, fake: ctypes.CDLL, headers: bytes, bodies: Sequence[bytes]) -> None:
        self._fake = fake
        self._headers = headers
        self._bodies = (ctypes.c_char_p * len(bodies))(*bodies)
        self._sizes = (ctypes.c_size_t * len(bodies))(*map(len, bodies))
        self._calls = (ctypes.c_void_p * len(bodies))()

    def begin(self) -> int:
        """They come; how many of them the lane takes. Those of before must be forgotten."""
        calls, headers = self._calls, self._headers
        return int(self._fake.fake_burst(calls, len(calls), headers, len(headers), self._bodies, self._sizes))

    @property
    def left(self) -> int:
        """How many have not ended."""
        return int(self._fake.fake_left(self._calls, len(self._calls)))

    def call(self, place: int) -> Request:
        """One of them."""
        request = self._calls[place]
        assert request is not None
        return Request(self._fake, request)

    def forget(self) -> None:
        """They are over for Envoy."""
        for request in self._calls:
            self._fake.fake_forget(ctypes.c_void_p(request))


class FakeEnvoy:
    """The worker thread, and the filter that runs in it."""

    def __init__(self, fake: ctypes.CDLL, library: Path) -> None:
        self._fake = fake
        fake.fake_begin.restype = ctypes.c_void_p
        fake.fake_sent.restype = fake.fake_run.restype = ctypes.c_size_t
        fake.fake_burst.restype = fake.fake_left.restype = ctypes.c_size_t
        fake.fake_went_on.restype = fake.fake_is_there.restype = fake.fake_stands.restype = ctypes.c_bool
        hooks = ctypes.CDLL(str(library))
        hooks.envoy_dynamic_module_on_http_filter_config_new.restype = ctypes.c_void_p
        empty = (ctypes.c_void_p(), ctypes.c_size_t())
        # As in Envoy: the filter is in its chain before Python imports the library.
        assert hooks.envoy_dynamic_module_on_http_filter_config_new(None, *empty, *empty)
        spec = importlib.util.spec_from_file_location(LANE, library)
        assert spec is not None
        assert spec.loader is not None
        self.filter: Any = importlib.util.module_from_spec(spec)
        """The filter as Python knows it."""
        spec.loader.exec_module(self.filter)
        under_test = (ctypes.c_void_p * len(_HOOKS)).in_dll(fake, "under_test")
        for number, name in enumerate(_HOOKS):
            hook = getattr(hooks, f"envoy_dynamic_module_on_http_filter_{name}")
            under_test[number] = ctypes.cast(hook, ctypes.c_void_p).value

    def request(self, *more: tuple[bytes, bytes], **changes: str | None) -> Request:
        """A plain call, with other headers or more of them."""
        text = _text(*more, **changes)
        return Request(self._fake, self._fake.fake_begin(text, len(text)))

    def burst(self, bodies: Sequence[bytes], **changes: str | None) -> Burst:
        """Plain calls with these bodies, and other headers."""
        return Burst(self._fake, _text(**changes), bodies)

    def run(self) -> int:
        """The worker does what was scheduled; how much that was."""
        return int(self._fake.fake_run())

    @property
    def wake(self) -> int:
        """The file descriptor that can be read from now on when there is something to `run`."""
        return int(self._fake.fake_wake())


def _text(*more: tuple[bytes, bytes], **changes: str | None) -> bytes:
    """The headers of a plain call, with others or more of them, as the fake reads them."""
    headers = PLAIN | {name.replace("_", "-"): value for name, value in changes.items()}
    named = [(name.encode(), value.encode()) for name, value in headers.items() if value is not None]
    return b"".join(b"%s=%s\n" % header for header in (*named, *more))


@cache
def fake_envoy() -> FakeEnvoy:
    """The Envoy of this process; there is one.

    The filter is a copy of its own: that of `server.envoy.lane` was loaded where there was no Envoy.

    Raises:
        hatch_compile.Unavailable: Nothing can be compiled here, or the filter was not.
    """
    import hatch_compile  # noqa: PLC0415 - is not installed with a wheel

    module = compiled(LANE)
    if module is None or module.__file__ is None:
        raise hatch_compile.Unavailable(f"{LANE} is not compiled; `make setup` does it")
    folder = Path(tempfile.mkdtemp())
    library, copy = folder / "fake_envoy.so", folder / Path(module.__file__).name
    _, command = hatch_compile.compiler(portable=False)
    flags = ("-O2", "-shared", "-fPIC", "-pthread", *hatch_compile.more_flags())
    subprocess.run([*command, *flags, str(_SOURCE), "-o", str(library)], check=True)  # noqa: S603 - a command of ours
    shutil.copy(os.environ.get("LANE_UNDER_TEST", module.__file__), copy)
    return FakeEnvoy(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL), copy)
