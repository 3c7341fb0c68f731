"""How a command connects to its server, and how it reports a call that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import typer

from pretrade.client.credentials import ClientCredentials, CredentialsError
from pretrade.client.stack_file import NoStackError, operator_token_file, stack_endpoint

_EXIT_CODES = {grpc.StatusCode.ABORTED: 4, grpc.StatusCode.DEADLINE_EXCEEDED: 7}


@contextmanager
def connected(target: str | None, directory: Path, endpoint: str) -> Iterator[grpc.Channel]:
    """A channel to the target, or to the stack in `directory`; turns failures into messages and exit codes."""
    try:
        address = target or stack_endpoint(directory, endpoint)
        opened = credentials(address, directory, admin=endpoint == "admin").channel(address)
    except NoStackError as error:
        typer.echo(error, err=True)
        raise typer.Exit(3) from None
    except CredentialsError as error:
        raise typer.BadParameter(str(error)) from None
    with opened as channel:
        try:
            yield channel
        except CredentialsError as error:
            raise typer.BadParameter(str(error)) from None
        except grpc.FutureTimeoutError:
            typer.echo(f"{address} cannot be reached", err=True)
            raise typer.Exit(3) from None
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code is grpc.StatusCode.UNAVAILABLE:
                typer.echo(f"{address} cannot be reached: {details}", err=True)
                raise typer.Exit(3) from None
            typer.echo(f"{code.name}: {details}", err=True)
            raise typer.Exit(_EXIT_CODES.get(code, 1)) from None
        except KeyboardInterrupt:
            raise typer.Exit(0) from None


def credentials(address: str, directory: Path, *, admin: bool) -> ClientCredentials:
    """What to show to a server: what the environment says; to an admin port of this machine its operator token."""
    given = ClientCredentials.from_environment()
    return given.or_operator_token(address, operator_token_file(directory, address)) if admin else given
