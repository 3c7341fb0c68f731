"""Journal heads: a server publishes how far each journal has come, so that a cut or exchanged journal is noticed.

A head is signed if a key is configured. Somebody who can write the database or the topic, but does not have the key,
cannot make another history look like the server's. Somebody with the server's own rights has the key as well: see
docs/security.md.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pretrade.audit.v1 import packet_pb2
from server.errors import KeyUnusableError
from server.journal.journal_file import Head

_KEY_ID_DIGITS: Final = 16


class SigningKey:
    """Signs heads.

    Args:
        path: PEM file of an Ed25519 private key without a passphrase.

    Raises:
        KeyUnusableError: It holds none, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise KeyUnusableError(f"{path}: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyUnusableError(f"{path}: not an Ed25519 key")
        self._key = key
        self._key_id = _key_id(key.public_key())

    def sign(self, head: packet_pb2.JournalHead) -> None:
        """Adds the key's id and the signature."""
        head.key_id = self._key_id
        head.signature = self._key.sign(_signed(head))


class VerifyingKey:
    """Tells whether heads were signed by the key whose public part this is.

    Args:
        path: PEM file of the public key.

    Raises:
        KeyUnusableError: It holds none, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            key = serialization.load_pem_public_key(path.read_bytes())
        except (OSError, ValueError) as error:
            raise KeyUnusableError(f"{path}: {error}") from error
        if not isinstance(key, Ed25519PublicKey):
            raise KeyUnusableError(f"{path}: not an Ed25519 key")
        self._key = key
        self.key_id = _key_id(key)

    def has_signed(self, head: packet_pb2.JournalHead) -> bool:
        """True when the head is as it was signed."""
        try:
            self._key.verify(head.signature, _signed(head))
        except InvalidSignature:
            return False
        return True


class Stating:
    """Makes the heads of one journal.

    Args:
        journal_id: The journal.
        slot: Where it is written.
        predecessor_id: The journal before it there; empty for none.
        key: Signs the heads; None: they are not signed.
    """

    def __init__(self, journal_id: str, slot: str, predecessor_id: str, key: SigningKey | None) -> None:
        self._journal_id = journal_id
        self._slot = slot
        self._predecessor_id = predecessor_id
        self._key = key

    def head(self, head: Head, now_ns: int, *, closed: bool = False) -> bytes:
        """A serialised `JournalHead`."""
        stated = packet_pb2.JournalHead(
            journal_id=self._journal_id,
            slot=self._slot,
            predecessor_id=self._predecessor_id,
            position=head.position,
            hash=head.hash,
            closed=closed,
            stated_at_ns=now_ns,
        )
        if self._key is not None:
            self._key.sign(stated)
        return stated.SerializeToString(deterministic=True)


def heads_topic(topic: str) -> str:
    """Where heads are published, beside the topic of the rows."""
    return f"{topic}.heads"


def slot_of(journal: Path, host_name: str) -> str:
    """Where a journal is written, as heads name it: the host and the file."""
    return f"{host_name}:{journal.absolute()}"


def _key_id(key: Ed25519PublicKey) -> str:
    return sha256(key.public_bytes_raw()).hexdigest()[:_KEY_ID_DIGITS]


def _signed(head: packet_pb2.JournalHead) -> bytes:
    """What the signature is of."""
    content = packet_pb2.JournalHead()
    content.CopyFrom(head)
    content.ClearField("signature")
    return content.SerializeToString(deterministic=True)
