"""Login at an OpenID provider: what makes a login, what makes none, and how long it lasts at a real server."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from support.console import RunningConsole, Visitor, clean_environment, running_console
from support.harness import eventually
from support.oidc_provider import CLIENT, SECRET, OidcProvider, Person
from support.secure_server import SecureServer, decide

from pretrade.console.oidc import LoginFailedError, OidcSettings, Provider, ProviderAwayError, RenewedToken, Tokens
from server.security.trial import TrialIssuer

_REDIRECT = "http://localhost:7020/login/oidc/callback"


@pytest.fixture
def at() -> Iterator[OidcProvider]:
    with OidcProvider().serving() as provider:
        yield provider


class Clock:
    ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


def provider_of(at: OidcProvider, clock: Clock | None = None, **changes: str) -> Provider:
    given = {"issuer": at.url, "client_id": CLIENT, "client_secret": at.secret, "scope": "openid"} | changes
    return Provider(OidcSettings.checked(**given), _REDIRECT, clock or Clock())


def sent_back(url: str) -> dict[str, str]:
    """The query with which the provider sends a browser back that it was sent."""
    answer = httpx.get(url)
    assert answer.headers["location"].startswith(f"{_REDIRECT}?"), answer.text
    return {name: values[0] for name, values in parse_qs(urlsplit(answer.headers["location"]).query).items()}


async def test_a_login_comes_to_the_providers_access_token(at: OidcProvider) -> None:
    provider = provider_of(at)
    begun = await provider.begin()
    asked = parse_qs(urlsplit(begun.url).query)
    assert "code_verifier" not in asked, "who reads the URL cannot use the code"
    tokens = await provider.finish(begun.kept, sent_back(begun.url))
    assert tokens.access.count(".") == 2
    assert 200 < tokens.renew_at - time.time() <= 300 - 45
    assert tokens.access not in repr(tokens)
    assert not at.refused


async def test_a_public_client_logs_in_without_a_secret(at: OidcProvider) -> None:
    at.secret = ""
    provider = provider_of(at)
    begun = await provider.begin()
    assert (await provider.finish(begun.kept, sent_back(begun.url))).access


async def test_a_code_is_worth_nothing_without_what_the_browser_kept(at: OidcProvider) -> None:
    provider = provider_of(at)
    one, other = await provider.begin(), await provider.begin()
    answer = sent_back(one.url)
    for kept in ("", "guess", other.kept, one.kept[:-1] + ("0" if one.kept[-1] != "0" else "1")):
        with pytest.raises(LoginFailedError):
            await provider.finish(kept, answer)
    with pytest.raises(LoginFailedError, match="not to the login that this browser has begun"):
        await provider.finish(one.kept, answer | {"state": "other"})
    stranger = provider_of(at)
    with pytest.raises(LoginFailedError, match="begun no login here"):
        await stranger.finish(one.kept, answer)
    assert (await provider.finish(one.kept, answer)).access
    with pytest.raises(LoginFailedError, match="the code was used"):
        await provider.finish(one.kept, answer)


async def test_the_code_of_another_login_fails_by_its_verifier(at: OidcProvider) -> None:
    provider = provider_of(at)
    mine, stolen = await provider.begin(), await provider.begin()
    answer = sent_back(mine.url) | {"code": sent_back(stolen.url)["code"]}
    with pytest.raises(LoginFailedError, match="another code_verifier"):
        await provider.finish(mine.kept, answer)


async def test_a_login_that_took_too_long_is_begun_anew(at: OidcProvider) -> None:
    clock = Clock()
    provider = provider_of(at, clock)
    begun = await provider.begin()
    answer = sent_back(begun.url)
    clock.ahead = 601.0
    with pytest.raises(LoginFailedError, match="took too long"):
        await provider.finish(begun.kept, answer)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aud": "another client"}, "aud|azp"),
        ({"aud": ["another client", CLIENT], "azp": "another client"}, "azp"),
        ({"iss": "https://another.example"}, "iss"),
        ({"nonce": "of another login"}, "nonce"),
        ({"nonce": None}, "nonce"),
        ({"exp": int(time.time()) - 3_600}, "exp"),
        ({"exp": None}, "exp"),
        ({"sub": None}, "sub"),
        ({"at_hash": "of-another-token"}, "at_hash"),
    ],
)
async def test_an_id_token_that_is_not_of_this_login_makes_none(
    at: OidcProvider, changes: dict[str, object], said: str
) -> None:
    at.id_changes = changes
    provider = provider_of(at)
    begun = await provider.begin()
    with pytest.raises(LoginFailedError, match=f"ID token is not good: .*({said})"):
        await provider.finish(begun.kept, sent_back(begun.url))


async def test_an_id_token_that_somebody_else_signed_makes_no_login(at: OidcProvider) -> None:
    provider = provider_of(at)
    for other in (TrialIssuer("provider-1"), TrialIssuer("unknown"), TrialIssuer("provider-1", "RS256")):
        at.id_issuer = other
        begun = await provider.begin()
        with pytest.raises(LoginFailedError, match="ID token is not good"):
            await provider.finish(begun.kept, sent_back(begun.url))


async def test_a_new_key_of_the_provider_is_taken_at_once(at: OidcProvider) -> None:
    provider = provider_of(at)
    await provider.begin()
    at.issuer = TrialIssuer("provider-2")
    begun = await provider.begin()
    assert (await provider.finish(begun.kept, sent_back(begun.url))).access


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"issuer": "https://another.example"}, "calls itself"),
        ({"token_endpoint": "http://example.com/token"}, "names no token_endpoint"),
        ({"jwks_uri": ""}, "names no jwks_uri"),
    ],
)
async def test_a_provider_that_is_not_who_it_should_be_gets_no_browser(
    at: OidcProvider, metadata: dict[str, str], said: str
) -> None:
    at.metadata = metadata
    with pytest.raises(LoginFailedError, match=said):
        await provider_of(at).begin()


async def test_an_answer_of_another_provider_and_a_refusal_are_told_apart(at: OidcProvider) -> None:
    provider = provider_of(at)
    begun = await provider.begin()
    answer = sent_back(begun.url)
    with pytest.raises(LoginFailedError, match="of another provider"):
        await provider.finish(begun.kept, answer | {"iss": "https://another.example"})
    with pytest.raises(LoginFailedError, match="access_denied: not today"):
        await provider.finish(begun.kept, answer | {"error": "access_denied", "error_description": "not today"})


async def test_a_provider_that_is_away_is_named() -> None:
    with OidcProvider().serving() as gone:
        provider = provider_of(gone)
    with pytest.raises(ProviderAwayError, match="does not answer"):
        await provider.begin()


async def test_a_token_is_renewed_before_it_expires_each_refresh_token_once(at: OidcProvider) -> None:
    at.refreshes, clock = True, Clock()
    provider = provider_of(at, clock)
    begun = await provider.begin()
    token = RenewedToken(provider, await provider.finish(begun.kept, sent_back(begun.url)), clock)
    first = token()
    await token.renew()
    assert token() == first
    for _ in range(3):
        clock.ahead += 270.0
        await asyncio.gather(*(token.renew() for _ in range(5)))
    assert at.refreshed == 3
    assert token() != first
    assert not at.refused


async def test_what_the_provider_renews_no_more_is_asked_for_once(at: OidcProvider) -> None:
    clock = Clock()
    token = RenewedToken(provider_of(at, clock), Tokens("access", "withdrawn", clock()), clock)
    await token.renew()
    await token.renew()
    assert at.refused == ["the refresh token was used"]
    assert token() == "access", "the server says when it is no good"


async def test_a_provider_that_is_away_is_asked_again_later(at: OidcProvider) -> None:
    clock = Clock()
    at.refreshes = True
    provider = provider_of(at, clock)
    begun = await provider.begin()
    token = RenewedToken(provider, await provider.finish(begun.kept, sent_back(begun.url)), clock)
    clock.ahead = 280.0
    real = provider._known
    provider._known = {**real, "token_endpoint": "http://127.0.0.1:1/token"}
    await token.renew()
    provider._known = real
    await token.renew()
    assert at.refreshed == 0, "not at once"
    clock.ahead += 11.0
    await token.renew()
    assert at.refreshed == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"issuer": "http://example.com"}, "must be an https URL"),
        ({"client_id": ""}, "client's id is needed"),
        ({"scope": "profile"}, "must have openid"),
    ],
)
def test_settings_that_cannot_be_used_are_named(changes: dict[str, str], said: str) -> None:
    given = {"issuer": "https://issuer.example", "client_id": CLIENT, "client_secret": "", "scope": "openid"} | changes
    with pytest.raises(ValueError, match=said):
        OidcSettings.checked(**given)


class Deployment:
    """A server that takes the provider's tokens, and a console where people log in at it."""

    def __init__(self, provider: OidcProvider, server: SecureServer, console: RunningConsole) -> None:
        self.provider, self.server, self.console = provider, server, console

    def log_in(self, visitor: Visitor) -> httpx.Response:
        """Goes to the provider and back, as a browser does."""
        to = visitor.get("/login/oidc")
        assert to.status_code == 303, to.text
        back = httpx.get(to.headers["location"]).headers["location"]
        return visitor.get(back.removeprefix(self.console.url.rstrip("/")))


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("server")
    secret = directory / "client-secret"
    secret.write_text(f"{SECRET}\n")
    with OidcProvider(refreshes=True).serving() as provider:
        tokens = {"TOKENS__JWKS": f"{provider.url}/jwks", "TOKENS__ISSUER": provider.url}
        with SecureServer(directory, "token").running(**tokens) as server:
            options = ("--oidc-issuer", provider.url, "--oidc-client-secret-file", str(secret))
            with running_console(clean_environment(server), "--target", server.admin, *options) as console:
                yield Deployment(provider, server, console)


@pytest.fixture
def visitor(deployment: Deployment) -> Iterator[Visitor]:
    with Visitor(deployment.console.url) as visitor:
        yield visitor


@pytest.mark.stack
def test_a_person_logs_in_at_the_provider_with_the_roles_that_its_token_has(
    deployment: Deployment, visitor: Visitor
) -> None:
    deployment.provider.person = Person("olga", ("operator",))
    page = visitor.get("/login").text
    assert f"Log in at {urlsplit(deployment.provider.url).netloc}" in page
    arrived = deployment.log_in(visitor)
    assert arrived.status_code == 200
    assert '<meta http-equiv="refresh" content="0;url=/">' in arrived.text
    cookies = arrived.headers.get_list("set-cookie")
    assert any(re.match(r"pretrade=[\w-]{40,}; HttpOnly; Path=/; SameSite=strict$", one) for one in cookies)
    assert any(one.startswith('pretrade-login=""') for one in cookies), "what was kept is forgotten"
    assert "<b>olga</b> · operator" in visitor.get("/").text
    answer = visitor.post("/act/flag", {"flag": "shadow", "value": "off", "reason": "drill"})
    assert answer.status_code == 303
    changes = eventually(lambda: visitor.get("/overview/changes").text, lambda text: "drill" in text)
    assert "<td>olga</td>" in changes


@pytest.mark.stack
def test_who_has_no_role_is_told_so_by_the_server(deployment: Deployment, visitor: Visitor) -> None:
    deployment.provider.person = Person("nobody", ("cleaner",))
    answer = deployment.log_in(visitor)
    assert answer.status_code == 403
    assert "You are logged in at the provider." in answer.text
    assert "PERMISSION_DENIED" in answer.text
    assert visitor.get("/").status_code == 303


@pytest.mark.stack
def test_a_browser_that_began_no_login_is_not_logged_in(deployment: Deployment, visitor: Visitor) -> None:
    """Else another site could log a person in as somebody else."""
    deployment.provider.person = Person("eve", ("admin",))
    with Visitor(deployment.console.url) as eve:
        to = eve.get("/login/oidc").headers["location"]
        back = httpx.get(to).headers["location"].removeprefix(deployment.console.url.rstrip("/"))
    answer = visitor.get(back)
    assert answer.status_code == 400
    assert "begun no login here" in answer.text
    assert visitor.get("/").status_code == 303


@pytest.mark.stack
def test_what_is_kept_at_the_browser_is_for_the_answer_alone(deployment: Deployment, visitor: Visitor) -> None:
    cookie = visitor.get("/login/oidc").headers["set-cookie"]
    assert re.match(r"pretrade-login=[^;]+; HttpOnly; Max-Age=600; Path=/; SameSite=lax$", cookie)


@pytest.mark.long
@pytest.mark.stack
def test_a_session_outlives_its_first_token_and_ends_when_the_provider_renews_no_more(
    deployment: Deployment, visitor: Visitor
) -> None:
    provider = deployment.provider
    provider.person, provider.lifetime = Person("vic", ("viewer",)), 4
    before = provider.refreshed
    try:
        deployment.log_in(visitor)
        # The server takes a token for five seconds more than it is valid, so the first one is no good any more then.
        eventually(lambda: (visitor.get("/"), provider.refreshed - before)[1], lambda count: count >= 6)
        assert "<b>vic</b>" in visitor.get("/").text
        provider.forget_refresh_tokens()
        eventually(lambda: visitor.get("/").headers.get("location"), lambda to: to == "/login?ended=1")
    finally:
        provider.lifetime = 300


@pytest.mark.long
@pytest.mark.stack
def test_a_live_page_outlives_its_first_token(deployment: Deployment, visitor: Visitor) -> None:
    provider = deployment.provider
    provider.person, provider.lifetime = Person("vic", ("viewer",)), 4
    before = provider.refreshed
    server = deployment.server
    trader = provider.issuer.token("desk", ["trader"], iss=provider.url)
    try:
        deployment.log_in(visitor)
        with visitor.stream("/decisions/tail") as events, server.channel(server.decision) as channel:
            assert next(events)[0] == "begun"
            seen: list[str] = []
            while provider.refreshed - before < 6:  # by then the server has ended the stream of the first token
                decide(channel, trader)
                name, _ = next(events)
                seen.append(name)
            decide(channel, trader)
            assert next(events)[0] == "rows"
            assert set(seen) == {"rows"}, "it never ended"
    finally:
        provider.lifetime = 300


@pytest.mark.stack
def test_a_token_still_logs_in_where_the_provider_is_away(deployment: Deployment, visitor: Visitor) -> None:
    own = deployment.provider.issuer.token("ann", ["admin"], iss=deployment.provider.url)
    assert visitor.log_in(own).status_code == 303
    assert "<b>ann</b> · admin" in visitor.get("/").text
