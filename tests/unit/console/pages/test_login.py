"""Logging in by the link that the command prints, and by a token, at an admin service of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import httpx
from support.admin_server import RefusedError, admin_server

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.client.credentials import ClientCredentials
from pretrade.console.application import Console
from pretrade.console.reach import Reach

_HERE = "http://localhost"


@asynccontextmanager
async def console(address: str, token: str | None) -> AsyncIterator[tuple[Console, httpx.AsyncClient]]:
    made = Console(address, ClientCredentials(token=token), Reach.of(listens_on="localhost"))
    transport = httpx.ASGITransport(made.asgi)
    async with httpx.AsyncClient(transport=transport, base_url=_HERE, headers={"origin": _HERE}) as browser:
        yield made, browser
    await made.end()


def of_a_machine(_: pb.GetCallerRequest) -> pb.GetCallerResponse:
    return pb.GetCallerResponse(name="operator-token", states_author=True, roles=["admin"])


def of_a_person(_: pb.GetCallerRequest) -> pb.GetCallerResponse:
    return pb.GetCallerResponse(name="ann", roles=["viewer"])


async def test_the_link_logs_in_once_and_wants_a_name() -> None:
    with admin_server(GetCaller=of_a_machine) as server:
        async with console(server.address, "secret") as (made, browser):
            assert made.tickets is not None
            ticket = made.tickets.new()
            page = (await browser.get(f"/login?ticket={ticket}")).text
            assert "Your name" in page
            assert 'name="token"' not in page
            assert "secret" not in page
            nameless = await browser.post("/login", data={"ticket": ticket})
            assert nameless.status_code == 400
            assert "Say who you are" in nameless.text
            assert not browser.cookies
            welcome = await browser.post("/login", data={"ticket": ticket, "name": "ann"})
            assert (welcome.status_code, welcome.headers["location"]) == (303, "/")
            assert "<b>ann</b>" in (await browser.get("/")).text
            assert "was used" in (await browser.get(f"/login?ticket={ticket}")).text
            again = await browser.post("/login", data={"ticket": ticket, "name": "eve"})
            assert again.status_code == 400


async def test_of_two_who_use_a_link_at_the_same_time_one_is_logged_in() -> None:
    with admin_server(GetCaller=of_a_machine) as server:
        async with console(server.address, "secret") as (made, browser):
            assert made.tickets is not None
            form = {"ticket": made.tickets.new(), "name": "ann"}
            answers = await asyncio.gather(*(browser.post("/login", data=form) for _ in range(4)))
            assert sorted(answer.status_code for answer in answers) == [303, 400, 400, 400]


async def test_a_command_without_credentials_has_no_link_and_no_login_without_a_token() -> None:
    with admin_server(GetCaller=of_a_person) as server:
        async with console(server.address, None) as (made, browser):
            assert made.tickets is None
            assert (await browser.post("/login", data={"ticket": ""})).status_code == 400
            assert not server.asked


async def test_who_the_server_knows_cannot_call_himself_otherwise() -> None:
    with admin_server(GetCaller=of_a_person) as server:
        async with console(server.address, None) as (_, browser):
            assert (await browser.post("/login", data={"token": "t", "name": "root"})).status_code == 303
            page = (await browser.get("/")).text
            assert "<b>ann</b> · viewer" in page
            assert "root" not in page


async def test_whoever_logs_in_again_has_one_session() -> None:
    with admin_server(GetCaller=of_a_person) as server:
        async with console(server.address, None) as (_, browser):
            await browser.post("/login", data={"token": "t"})
            first = browser.cookies["pretrade"]
            await browser.post("/login", data={"token": "t"})
            assert browser.cookies["pretrade"] != first
            stale = httpx.AsyncClient(transport=browser._transport, base_url=_HERE, cookies={"pretrade": first})
            assert (await stale.get("/")).status_code == 303


async def test_a_server_that_is_away_or_too_old_is_named() -> None:
    def unknown(_: pb.GetCallerRequest) -> pb.GetCallerResponse:
        raise RefusedError(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

    with admin_server(GetCaller=unknown) as server:
        async with console(server.address, None) as (_, browser):
            old = await browser.post("/login", data={"token": "t"})
            assert old.status_code == 502
            assert "is not the admin port of a server of this version" in old.text
    async with console(server.address, None) as (_, browser):
        away = await browser.post("/login", data={"token": "t"})
        assert away.status_code == 502
        assert f"{server.address} cannot be reached" in away.text
