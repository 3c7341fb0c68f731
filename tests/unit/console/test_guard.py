"""Who the guard lets through to a page, and what it makes of a proxy in front."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.responses import PlainTextResponse

from pretrade.console.guard import Guard
from pretrade.console.reach import Reach, origin_of

_DIRECT = Reach.of(listens_on="127.0.0.1")
_BEHIND = Reach.of(listens_on="0.0.0.0", public_url="https://Console.Example.com:443/")


@asynccontextmanager
async def calling(reach: Reach) -> AsyncIterator[httpx.AsyncClient]:
    guard = Guard(PlainTextResponse("through"), reach)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://10.1.2.3:7020") as client:
        yield client


async def test_a_form_through_a_proxy_that_ends_tls_is_of_the_consoles_own_origin() -> None:
    async with calling(_BEHIND) as client:
        headers = {"host": "console.example.com", "origin": "https://console.example.com"}
        assert (await client.post("/logout", headers=headers, data={})).text == "through"
        forged = await client.post("/logout", headers=headers | {"origin": "https://evil.example.com"}, data={})
        assert forged.status_code == 403


async def test_a_header_alone_makes_no_proxy() -> None:
    async with calling(_DIRECT) as client:
        headers = {"host": "localhost", "origin": "https://localhost", "x-forwarded-proto": "https"}
        assert (await client.post("/logout", headers=headers, data={})).status_code == 403


async def test_whether_it_serves_is_said_to_a_probe_that_has_only_the_pods_address() -> None:
    async with calling(_BEHIND) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/")).status_code == 421
        assert (await client.post("/health", data={})).status_code == 421, "and nothing else is"


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://Console.example.com/", "https://console.example.com"),
        ("https://console.example.com:443", "https://console.example.com"),
        ("http://localhost:7020", "http://localhost:7020"),
        ("https://[fd00::1]:8443", "https://[fd00::1]:8443"),
    ],
)
def test_an_origin_is_as_browsers_write_it(url: str, origin: str) -> None:
    assert origin_of(url) == origin


@pytest.mark.parametrize(
    "url",
    [
        "console.example.com",
        "ftp://a",
        "https://",
        "https://a/pretrade",
        "https://a?b=c",
        "https://me@a",
        "https://a:b",
    ],
)
def test_what_is_no_origin_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not like https://|Port"):
        origin_of(url)


def test_behind_a_proxy_with_tls_the_cookie_is_secure() -> None:
    assert _BEHIND.is_secure
    assert not _DIRECT.is_secure
    assert not Reach.of(listens_on="10.1.2.3", public_url="http://console", has_tls=True).is_secure


def test_an_address_that_stands_for_all_is_no_name() -> None:
    assert _BEHIND.names == {"127.0.0.1", "::1", "localhost", "console.example.com"}
