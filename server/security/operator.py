"""The operator token: the credential for operators when no token issuer and no certificate authority are set up.

The token is in a file beside the journal that only the server's own user can read, and is made anew at every start. The
`pretrade` command finds it there by itself (`pretrade.client.operator_token`). A program that shares the machine or the
pod with the server, but neither its user nor its files, cannot steer it. The main example is a model server that runs
an archive from somebody else.
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
