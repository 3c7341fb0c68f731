"""Settings of TLS, tokens and access, and the checks that they fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from feature_cache.constants import Constant
from pretrade.client.addresses import is_loopback
from server.security.identity import Policy, Principal, RateTier, Role, Strategies, Tiers

DecisionCredential = Literal["open", "token", "certificate"]
AdminCredential = Literal["operator_token", "token", "certificate"]
Algorithm = Literal["RS256", "ES256"]


class TlsSettings(BaseModel):
    """TLS of the decision and the admin port, from version 1.2 on.

    Files are PEM and may be replaced at any time. The next connection uses the new ones, open ones continue. Invalid
    files leave the last ones in use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    certificate: Path | None = None
    """PEM file with the server's certificate, followed by the intermediate ones. Unset: no TLS. Set it as soon as
    callers are on another machine."""
    key: Path | None = None
    """Its private key, not encrypted."""
    client_ca: Path | None = None
    """PEM file of the authorities whose client certificates identify callers. Required where `access` says
    `certificate`."""
    client_crl: Path | None = None
    """PEM file with revocation lists of these authorities. A revoked certificate is refused, on open connections as
    well."""
    refresh_seconds: Constant[float] = 1.0
    """Time between two checks of the files, in seconds. Reading a few small files each second costs next to nothing."""
    warn_days: float = Field(default=14.0, ge=0, le=366)
    """The component `certificates` is unhealthy when the certificate expires within this many days. Set it to the time
    that a renewal takes you."""

    @model_validator(mode="after")
    def _belong_together(self) -> TlsSettings:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client_ca needs certificate")
        if self.client_crl is not None and self.client_ca is None:
            raise ValueError("client_crl needs client_ca")
        return self


class ClientTlsSettings(BaseModel):
    """TLS to a server that this one calls.

    Files are PEM and may be replaced at any time: a connection with the new ones then replaces the one before. Invalid
    files leave the last ones in use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca: Path | None = None
    """Authorities that are believed; unset: those that gRPC comes with."""
    certificate: Path | None = None
    """Our own certificate, followed by the intermediate ones, where the server asks for one."""
    key: Path | None = None
    """Its private key, not encrypted."""
    server_name: str | None = Field(default=None, min_length=1)
    """The name that must be in the server's certificate; unset: the host of its address."""

    @model_validator(mode="after")
    def _belong_together(self) -> ClientTlsSettings:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together")
        return self


class TokenSettings(BaseModel):
    """JSON Web Tokens of callers: `authorization: Bearer …`.

    They need `exp`, `iat`, `iss`, `aud`, `sub` and a known `kid`, and are signed with a public-key algorithm.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    issuer: str | None = Field(default=None, min_length=1)
    """The `iss` that a token must have. Required with `jwks`."""
    audience: str = Field(default="pretrade", min_length=1)
    """A token is accepted only if this is in its `aud`."""
    jwks: str | None = None
    """The issuer's public keys: a file, or an `https://` URL (`http://` on loopback)."""
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)] = ("RS256", "ES256")
    """Signature algorithms that are accepted; a JSON list. Set it to what your issuer uses."""
    name_claim: str = Field(default="sub", min_length=1)
    """The claim that names the caller in the audit, such as `preferred_username` or `email` where `sub` is a number
    that nobody knows. Choose one that callers cannot change themselves: who could take another's name would act in
    it."""
    roles_claim: str = Field(default="roles", min_length=1)
    """The claim whose value, or list of values, is looked up in `access.roles` as `claim:<value>`."""
    leeway_seconds: Constant[float] = 5.0
    """How far the issuer's clock and ours may differ, in seconds. Clocks that are synchronised differ by less."""
    max_lifetime_seconds: float = Field(default=86_400.0, ge=60, le=31_622_400)
    """A token that is valid for longer than this, from `iat` to `exp`, is refused; in seconds. Lower it to limit the
    use of a stolen token."""
    revoked: Path | None = None
    """File with the `jti` of revoked tokens, one a line. You may replace it at any time."""
    refresh_seconds: Constant[float] = 300.0
    """Time between two requests for a URL's keys, in seconds; a file is checked every `tls.refresh_seconds`. A new key
    need not wait for it, because an unknown `kid` fetches the keys at once."""
    refetch_seconds: Constant[float] = 10.0
    """An unknown `kid` has the keys fetched at once, but not sooner than this after the last time, in seconds. Nobody
    can have the issuer asked more often by inventing keys."""
    max_key_age_seconds: float = Field(default=86_400.0, ge=1, le=31_622_400)
    """If a URL's keys could not be fetched for this long, in seconds, no token is accepted any more. Raise it if your
    issuer may be away for longer."""

    @model_validator(mode="after")
    def _belong_together(self) -> TokenSettings:
        if self.jwks is None:
            return self
        if self.issuer is None:
            raise ValueError("jwks needs issuer")
        url = urlsplit(self.jwks)
        if "@" in url.netloc:
            raise ValueError("jwks: public keys need no name and password, and these would be shown")
        if url.scheme not in ("", "https") and not (url.scheme == "http" and is_loopback(url.hostname or "")):
            raise ValueError("jwks: must be a file or an https URL")
        return self


class AccessSettings(BaseModel):
    """Who may call what. Health checks are for everybody, on both ports and at any rate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decision: DecisionCredential = "open"
    """What identifies the callers of the decision port: nothing (`open`, on loopback only), a `token`, or a client
    `certificate`."""
    decision_open_to_network: bool = False
    """Let the decision port be `open` beyond loopback. Everybody who can reach it may then ask for decisions, in the
    name of any strategy. Only for networks that you alone use."""
    admin: AdminCredential = "operator_token"
    """What identifies the callers of the admin port: a `token`, a client `certificate` or, on loopback only and without
    TLS, the `operator_token`. That is the content of the file `<journal>.operator-token`, and allows everything. The
    server makes it anew at every start, readable for its own user alone; the `pretrade` command finds it by itself."""
    roles: dict[Principal, Role | tuple[Role, ...]] = {}
    """Roles of callers. It is a JSON object whose keys are principals: `sub:…` or `claim:…` (of a token), `uri:…`,
    `dns:…` or `cn:…` (of a certificate's names). Its values are a role or a list of roles: `trader` (asks for
    decisions, reports outcomes), `viewer` (reads), `operator` (reads and steers) or `admin` (everything)."""
    strategies: Strategies | None = None
    """Strategies that callers may name in their orders: a JSON object from a principal, as in `roles`, to a name or a
    list of names, in which `*` stands for any characters (`twap-*`). An order of another strategy is refused with
    PERMISSION_DENIED. Unset here and in the policy file: every caller may use any name, so limits by strategy rely on
    callers to use their own. An empty object: callers may use only the names that the policy file gives them."""
    rates: Tiers = {}
    """Rates of some callers: a JSON object from a principal, or from `role:trader`, `role:viewer`, `role:operator` or
    `role:admin`, to an object of `decisions_per_second` and `admin_calls_per_second`. The first principal of a caller
    that has a rate counts. Otherwise the highest rate of its roles counts, and otherwise the two settings below."""
    policy: Path | None = None
    """JSON file with further `roles`, `strategies` and `rates`, and with `denied`, a list of principals that may do
    nothing. You may replace it at any time; it then applies to open streams as well. Use it to change access without a
    restart."""
    decisions_per_second: float | None = Field(default=None, gt=0, le=1e6)
    """Orders a second that one caller may ask about, in each server process, over all its connections and streams;
    twice as many may come at once. More are refused with RESOURCE_EXHAUSTED. Unset: any number. Set it so that one
    caller cannot take the server from the others."""
    admin_calls_per_second: float = Field(default=50.0, gt=0, le=1e6)
    """Calls a second that one identified caller of the admin port may make; twice as many may come at once."""
    failures_per_second: float = Field(default=5.0, gt=0, le=1e6)
    """Attempts a second with unknown credentials that are verified, for one address; four times as many may come at
    once. More are refused without a look at them. Each server process records at most this many refusals a second in
    the audit."""

    def base_policy(self) -> Policy:
        """What the settings say, without the policy file."""
        general = RateTier(
            decisions_per_second=self.decisions_per_second, admin_calls_per_second=self.admin_calls_per_second
        )
        return Policy(self.roles, self.strategies, self.rates, general)


def check(
    tls: TlsSettings, tokens: TokenSettings, access: AccessSettings, hosts: dict[str, str], http: str | None = None
) -> None:
    """Refuses what would leave a port open, or closed to everybody.

    Args:
        tls: Certificates.
        tokens: Whose tokens are believed.
        access: What each port asks for.
        hosts: The address that each of `decision` and `admin` listens on.
        http: The address that the HTTP port listens on, where both are served as well; None without one.

    Raises:
        ValueError: They do not fit together.
    """
    if http is not None and not is_loopback(http):
        _check_http(tls, access)
    for plane, host in hosts.items():
        credential: DecisionCredential | AdminCredential = getattr(access, plane)
        if credential == "token" and tokens.jwks is None:
            raise ValueError(f"access.{plane}: a token needs tokens.jwks and tokens.issuer")
        if credential == "token" and tls.certificate is None and not is_loopback(host):
            raise ValueError(f"access.{plane}: tokens are sent over TLS only: set tls.certificate and tls.key")
        if credential == "certificate" and tls.client_ca is None:
            raise ValueError(f"access.{plane}: a certificate needs tls.client_ca")
        if credential in ("token", "certificate") and not access.roles and access.policy is None:
            raise ValueError(f"access.{plane}: no caller has a role: set access.roles or access.policy")
    if access.admin == "operator_token" and not is_loopback(hosts["admin"]):
        raise ValueError(
            "admin.host: with the operator token the admin plane listens on loopback only: set access.admin to `token` "
            "or `certificate`"
        )
    if access.decision == "open" and not access.decision_open_to_network and not is_loopback(hosts["decision"]):
        raise ValueError(
            "grpc.host: an open decision port listens on loopback only: set access.decision to `token` or "
            "`certificate`, or access.decision_open_to_network to true in a network that is yours alone"
        )
    if access.decision == "open":
        of_callers = {"decisions_per_second": access.decisions_per_second, "strategies": access.strategies}
        for name in (name for name, value in of_callers.items() if value is not None):
            raise ValueError(f"access.{name}: callers are not identified on a decision port that is open")


def _check_http(tls: TlsSettings, access: AccessSettings) -> None:
    """Refuses an HTTP port beyond loopback where callers would need no credentials, or would show them to everybody."""
    if access.decision == "open" or access.admin == "operator_token":
        raise ValueError(
            "http.host: beyond loopback the HTTP port needs access.decision and access.admin to be `token` or "
            "`certificate`"
        )
    if tls.certificate is None:
        raise ValueError("http.host: beyond loopback the HTTP port needs TLS: set tls.certificate and tls.key")
