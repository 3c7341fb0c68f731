"""A certificate authority that can revoke what it certified."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from server.security.trial import KeyPair, TrialAuthority

_BACKDATED: Final = dt.timedelta(minutes=5)


class RevokingAuthority(TrialAuthority):
    """The authority of the trial credentials, with a revocation list."""

    def revoking(self, pairs: Iterable[KeyPair]) -> bytes:
        """A list that revokes these certificates, in PEM."""
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._name)
        builder = builder.last_update(now - _BACKDATED).next_update(now + dt.timedelta(days=1))
        for pair in pairs:
            revoked = x509.RevokedCertificateBuilder().serial_number(pair.serial).revocation_date(now - _BACKDATED)
            builder = builder.add_revoked_certificate(revoked.build())
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)
