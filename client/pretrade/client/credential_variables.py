"""The environment variables that hold a caller's credentials. Reading their names loads no gRPC."""

from __future__ import annotations

from typing import Final

CA: Final = "PRETRADE_CLIENT_CA"
CERTIFICATE: Final = "PRETRADE_CLIENT_CERTIFICATE"
KEY: Final = "PRETRADE_CLIENT_KEY"
TLS_NAME: Final = "PRETRADE_CLIENT_TLS_NAME"
TOKEN: Final = "PRETRADE_CLIENT_TOKEN"  # noqa: S105 - the variable's name
TOKEN_FILE: Final = "PRETRADE_CLIENT_TOKEN_FILE"  # noqa: S105
