"""The library for callers of a server, and the `pretrade` command (`pretrade.client.cli`).

`Client` asks from threads and `AsyncClient` from asyncio; docs/client-python.md is their page. The library needs only
gRPC and protobuf, and the command needs Typer and Rich besides; neither needs what runs a server. The messages and the
stubs are in the same namespace: `pretrade.decision.v1`, `pretrade.admin.v1` and `pretrade.audit.v1`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pretrade.client.aio import AsyncClient as AsyncClient
    from pretrade.client.blocking import Client as Client
    from pretrade.client.decisions import Decision as Decision
    from pretrade.client.errors import (
        CallError as CallError,
    )
    from pretrade.client.errors import (
        ClosedError as ClosedError,
    )
    from pretrade.client.errors import (
        CredentialsError as CredentialsError,
    )
    from pretrade.client.errors import (
        DeadlineError as DeadlineError,
    )
    from pretrade.client.errors import (
        InvalidOrderError as InvalidOrderError,
    )
    from pretrade.client.errors import (
        KeyReusedError as KeyReusedError,
    )
    from pretrade.client.errors import (
        OverloadedError as OverloadedError,
    )
    from pretrade.client.errors import (
        PermissionDeniedError as PermissionDeniedError,
    )
    from pretrade.client.errors import (
        PretradeError as PretradeError,
    )
    from pretrade.client.errors import (
        ServerError as ServerError,
    )
    from pretrade.client.errors import (
        UnauthenticatedError as UnauthenticatedError,
    )
    from pretrade.client.errors import (
        UnavailableError as UnavailableError,
    )
    from pretrade.client.errors import (
        WrongServerError as WrongServerError,
    )
    from pretrade.client.orders import Features as Features
    from pretrade.client.orders import Order as Order
    from pretrade.client.shared import AsyncShared as AsyncShared
    from pretrade.client.shared import Shared as Shared
    from pretrade.client.streams import AsyncStream as AsyncStream

_ERRORS: Final = (
    "CallError",
    "ClosedError",
    "CredentialsError",
    "DeadlineError",
    "InvalidOrderError",
    "KeyReusedError",
    "OverloadedError",
    "PermissionDeniedError",
    "PretradeError",
    "ServerError",
    "UnauthenticatedError",
    "UnavailableError",
    "WrongServerError",
)
_MODULES: Final = {
    "AsyncClient": "aio",
    "AsyncShared": "shared",
    "AsyncStream": "streams",
    "Client": "blocking",
    "Decision": "decisions",
    "Features": "orders",
    "Order": "orders",
    "Shared": "shared",
    **dict.fromkeys(_ERRORS, "errors"),
}


def __getattr__(name: str) -> Any:
    """Loads what is asked for: the help of the `pretrade` command needs no gRPC."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_MODULES)
