"""The operator token: what a server asks of those who steer it, where no issuer and no authority was set up for that.

It stands in a file that only the server's own user can read, beside the journal, and is made anew at every start. The
`pretrade` command finds it there by itself (`pretrade.client.operator_token`). What shares the machine or the pod with
the server but neither its user nor its files, a model server that runs somebody's archive above all, cannot steer it.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from server.machine import Machine

NAME: Final = "operator"
"""Of the caller who shows the token: it names a machine's operator and no person, who therefore says who he is."""
_BYTES: Final = 32


def make_token(path: Path, machine: Machine) -> bytes:
    """Makes a new token in place of the one before; returns its digest.

    Raises:
        OSError: The file cannot be written.
    """
    token = base64.urlsafe_b64encode(machine.random_bytes(_BYTES)).rstrip(b"=")
    new = path.with_name(f"{path.name}.new")
    machine.files.write(new, token + b"\n")
    machine.files.replace(new, path)
    return digest(token)


def read_token(path: Path, machine: Machine) -> bytes:
    """The digest of the token that the supervisor of this process made.

    Raises:
        OSError: It cannot be read, or is none.
    """
    content, _ = machine.files.read(path)
    token = content.strip()
    if len(token) < _BYTES:
        raise OSError(f"{path} holds no operator token: shorter than {_BYTES} characters")
    return digest(token)


def digest(token: bytes) -> bytes:
    """What a token is compared by, so that the time a comparison takes tells nothing of it."""
    return hashlib.sha256(token).digest()
