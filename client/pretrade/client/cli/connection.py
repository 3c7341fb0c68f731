"""How a command connects to its server, and how it reports a call that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import grpc
import typer

from pretrade.client.cli.options import ADMIN_TARGET, DECISION_TARGET, UNREACHABLE
from pretrade.client.credentials import ClientCredentials
from pretrade.client.errors import CredentialsError
from pretrade.client.stack_file import NoStackError, operator_token_file, stack_endpoint

RPC_SECONDS: Final = 3.0
"""How long a call may take that waits for nothing but the server."""
_EXIT_CODES: Final = {grpc.StatusCode.ABORTED: 4}
_VARIABLES: Final = {"decision": DECISION_TARGET, "admin": ADMIN_TARGET}
_OTHER_PORT: Final = "Method not found!"
"""What a gRPC server says that does not have the service."""


@contextmanager
def connected(target: str | None, directory: Path, endpoint: str) -> Iterator[grpc.Channel]:
    """A channel to the target, or to the stack in `directory`; turns failures into messages and exit codes.

    Args:
        target: `HOST:PORT`; None for that of the stack.
        directory: Where a stack is looked for.
        endpoint: The port that is called: `decision` or `admin`.
    """
    try:
        instead = f"--target HOST:PORT, or {_VARIABLES[endpoint]}"
        address = target or stack_endpoint(directory, endpoint, instead)
        opened = credentials(address, directory, admin=endpoint == "admin").channel(address)
    except NoStackError as error:
        typer.echo(error, err=True)
        raise typer.Exit(UNREACHABLE) from None
    except CredentialsError as error:
        raise typer.BadParameter(str(error)) from None
    with opened as channel:
        try:
            yield channel
        except CredentialsError as error:
            raise typer.BadParameter(str(error)) from None
        except grpc.FutureTimeoutError:
            typer.echo(f"{address} cannot be reached", err=True)
            raise typer.Exit(UNREACHABLE) from None
        except grpc.RpcError as error:
            raise _reported(error, address, endpoint) from None
        except KeyboardInterrupt:
            raise typer.Exit(0) from None


def credentials(address: str, directory: Path, *, admin: bool) -> ClientCredentials:
    """What to show to a server: what the environment says; to an admin port of this machine its operator token."""
    given = ClientCredentials.from_environment()
    return given.or_operator_token(address, operator_token_file(directory, address)) if admin else given


def _reported(error: grpc.RpcError, address: str, endpoint: str) -> typer.Exit:
    """Says why a call failed; the exit, to be raised."""
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.UNAVAILABLE:
        typer.echo(f"{address} cannot be reached: {details}", err=True)
        return typer.Exit(UNREACHABLE)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and endpoint == "admin":  # a change in doubt was reported before
        typer.echo(f"{address} did not answer in time", err=True)
        return typer.Exit(UNREACHABLE)
    if code is grpc.StatusCode.UNIMPLEMENTED and details == _OTHER_PORT:
        typer.echo(
            f"{address} is not the {endpoint} port of a decision server: a server answers there that does not know "
            f"this call.\nName the {endpoint} port: --target HOST:PORT, or {_VARIABLES[endpoint]}. By default a server "
            "listens on 7001 for decisions and on 7002 for administration; `pretrade up` prints its own ports.",
            err=True,
        )
        return typer.Exit(UNREACHABLE)
    typer.echo(f"{code.name}: {details}", err=True)
    return typer.Exit(_EXIT_CODES.get(code, 1))
