"""The metrics of credentials and access; `Security.metrics` yields them."""

from __future__ import annotations

from typing import Final

from feature_cache.metrics import Counter, Gauge, declared

ACCESS_REFUSED: Final = Counter(
    "pretrade_access_refused", "Calls refused for want of credentials, roles or patience.", ("plane", "reason")
)
TOKENS_VERIFIED: Final = Counter("pretrade_tokens_verified", "Signatures of tokens verified; known tokens cost none.")
CREDENTIALS_VERSION: Final = Gauge(
    "pretrade_credentials_version", "Grows with every replacement that came into force.", ("file",)
)
CREDENTIALS_FAILURES: Final = Counter(
    "pretrade_credentials_failures", "Replacements that were invalid; the last valid ones stay in use.", ("file",)
)
CERTIFICATE_EXPIRY_SECONDS: Final = Gauge(
    "pretrade_certificate_expiry_seconds", "When the server's certificate expires, Unix time."
)

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""
