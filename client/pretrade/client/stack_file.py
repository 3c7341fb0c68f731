"""The file in which a running stack (`pretrade up`) says where its parts are, and how every other command finds it.

The stack writes `stack.json` when it is ready and removes it when it stops. It also holds a lock on the file `lock`
beside it for as long as anything of it runs. A file that a killed stack left behind is therefore recognised as stale,
even after a restart of the machine or the container, when its process id may belong to another process.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Final, Self

from pretrade.client.file_lock import take_lock

STACK_FILE: Final = "stack.json"
"""Name of the file in the stack's directory, there from when the stack is ready until it stops."""
LOCK_FILE: Final = "lock"
"""Name of the file that a stack locks, there once any stack was started in the directory."""
DEFAULT_DIRECTORY: Final = Path(".pretrade")
"""Where a stack is looked for by default: below the current directory."""

_DATABASE: Final = re.compile(r"[^:/]+://(?:[^:/@]*(?::[^@]*)?@)?((?:\[[^/?\]]+\]|[^/:?@]+)(?::\d+)?)")
"""A database's URL; the group is its host, with the port where it names one."""


class NoStackError(Exception):
    """No stack can be used in the directory; the message says why, and what to do."""


class StackFormatError(ValueError):
    """The file is not of this version of pretrade."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoints:
    """Where the parts are reached; None where a part neither runs nor was given."""

    redis_url: str | None
    """With its password, as the next but one."""
    kafka_bootstrap_servers: str | None
    database_url: str | None
    """SQLAlchemy URL, with its password."""
    primary: str | None
    """gRPC `host:port`, as the next four; several with commas between them."""
    secondary: str | None
    challenger: str | None
    decision: str | None
    admin: str | None
    metrics_url: str | None
    """Base URL of the decision server's metrics."""
    http_url: str | None = None
    """Base URL of JSON over HTTP."""
    worker_url: str | None
    """Base URL of the feature worker's metrics and health."""
    journal: str | None
    """Path of the audit journal."""
    operator_token_file: str | None = None
    """What the admin service wants to be shown, in a file; None without a server of our own."""
    model_store: str | None
    """Folder of the models' archives, every version that was trained there."""
    management: Mapping[str, str] = field(default_factory=dict)
    """gRPC address of the management service of each TorchServe that the stack runs, by role; several as above."""
    token_files: Mapping[str, str] = field(default_factory=dict)
    """`key_file.json` of each TorchServe that asks for tokens, by part."""
    instruments: tuple[str, ...]
    prometheus_url: str | None = None
    """Base URL of Prometheus and its page."""
    alertmanager_url: str | None = None
    """Base URL of Alertmanager, its API and its page."""
    console_url: str | None = None
    """Base URL of the console."""
    console_key_file: str | None = None
    """What links are sealed with that log in to the console, in a file."""

    @property
    def redis_address(self) -> str | None:
        """The URL of Redis without name and password, for people; None without one."""
        if self.redis_url is None:
            return None
        scheme, _, rest = self.redis_url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    @property
    def database_address(self) -> str | None:
        """`host:port` of the database, for people; None without one, or for a file."""
        found = _DATABASE.match(self.database_url) if self.database_url else None
        return found[1] if found else None


@dataclass(frozen=True, kw_only=True, slots=True)
class StackFile:
    """The content of `stack.json`."""

    pid: int
    """The process that runs the stack."""
    endpoints: Endpoints
    processes: Mapping[str, int]
    """Process id of each part that it started."""

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """Reads the file of a stack that runs in `directory`; None when none does.

        Raises:
            StackFormatError: Another version of pretrade wrote it.
            PermissionError: It belongs to another user.
        """
        try:
            content = (directory / STACK_FILE).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not is_locked(directory):
            return None
        stack = cls._from_json(content)
        return stack if _is_alive(stack.pid) else None  # its parts are being ended, if it was killed

    def write(self, directory: Path) -> None:
        """Writes the file whole, for our eyes only: it holds the database's password."""
        unfinished = directory / f"{STACK_FILE}.new"
        unfinished.unlink(missing_ok=True)
        unfinished.touch(mode=0o600)
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n")
        unfinished.rename(directory / STACK_FILE)

    @classmethod
    def _from_json(cls, content: bytes) -> Self:
        try:
            found = json.loads(content)
            stack = cls(endpoints=Endpoints(**found.pop("endpoints")), **found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StackFormatError(f"{STACK_FILE}: {error}") from error
        if not _is_sound(stack):
            raise StackFormatError(f"{STACK_FILE}: a value of another type")
        return replace(stack, endpoints=replace(stack.endpoints, instruments=tuple(stack.endpoints.instruments)))


def _is_sound(stack: StackFile) -> bool:
    """Whether every value that was read has the type of its field."""
    endpoints = stack.endpoints
    texts = [getattr(endpoints, one.name) for one in fields(endpoints) if one.type == "str | None"]
    mappings = (stack.processes, endpoints.management, endpoints.token_files)
    names: object = endpoints.instruments  # JSON has lists, no tuples
    return (
        isinstance(stack.pid, int)
        and all(text is None or isinstance(text, str) for text in texts)
        and all(isinstance(one, dict) for one in mappings)
        and all(isinstance(process, int) for process in stack.processes.values())
        and all(isinstance(text, str) for one in mappings[1:] for text in one.values())
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
    )


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def is_locked(directory: Path) -> bool:
    """Whether a stack holds the directory: it runs, is starting, or its parts are being ended.

    Raises:
        PermissionError: It belongs to another user.
    """
    try:
        # Shared, so that two who look at the same time do not take each other for a stack.
        lock = take_lock(directory / LOCK_FILE, create=False, shared=True)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if lock is None:
        return True
    os.close(lock)
    return False


def running_stack(directory: Path, instead: str | None = None) -> StackFile:
    """The stack that runs in `directory`.

    Args:
        directory: Where it was started.
        instead: The option that makes a stack unnecessary, with its value: `--target HOST:PORT`.

    Raises:
        NoStackError: None runs there, or it cannot be read.
    """
    place = directory.absolute()
    otherwise = f", or give {instead}" if instead else ""
    try:
        found = StackFile.read(directory)
        busy = found is None and is_locked(directory)
    except PermissionError:
        raise NoStackError(f"{place} belongs to another user. Run this as that user{otherwise}.") from None
    except StackFormatError:
        raise NoStackError(
            f"The stack in {place} was started by another version of pretrade. Stop it with Ctrl-C where it runs, and"
            f" start it again{otherwise}."
        ) from None
    if found is not None:
        return found
    if busy:
        raise NoStackError(f"The stack in {place} is still starting, or about to end. Try again when it says it is up.")
    advice = [
        f"No stack runs in {place}.",
        *([f"  If a server runs elsewhere:  {instead}"] if instead else []),
        f"  If a stack runs elsewhere:   cd to its folder, or name its directory: --dir FOLDER/{DEFAULT_DIRECTORY},"
        " or PRETRADE_LOCAL_DIR",
        "  To start one here:           pretrade up",
    ]
    raise NoStackError("\n".join(advice))


def stack_endpoint(directory: Path, endpoint: str, instead: str = "--target HOST:PORT") -> str:
    """An endpoint of the stack that runs in `directory`, by its name in `Endpoints`.

    Raises:
        NoStackError: No stack runs there, or it runs without that part.
    """
    address = getattr(running_stack(directory, instead).endpoints, endpoint)
    if address is None:
        raise NoStackError(f"The stack in {directory.absolute()} has no {endpoint} endpoint: give {instead}.")
    return str(address)


def operator_token_file(directory: Path, address: str) -> Path | None:
    """The operator token of the stack that runs in `directory`; None when something else listens at `address`."""
    try:
        endpoints = running_stack(directory).endpoints
    except NoStackError:
        return None
    found = endpoints.operator_token_file
    return Path(found) if found is not None and endpoints.admin == address else None
