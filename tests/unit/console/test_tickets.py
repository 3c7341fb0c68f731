"""Links that log somebody in once."""

from __future__ import annotations

import pytest

from pretrade.console.tickets import Tickets, link, ticket

_KEY = b"k" * 32


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_ticket_is_good_once_and_not_for_long(clock: Clock) -> None:
    tickets = Tickets(_KEY, clock)
    one, late = tickets.new(), tickets.new()
    assert one != late
    assert tickets.fits(one)
    assert tickets.use(one)
    assert not tickets.fits(one)
    assert not tickets.use(one)
    clock.now += 601.0
    assert not tickets.fits(late)
    assert not tickets.use(late)


def test_whoever_has_the_key_makes_links_and_nobody_else(clock: Clock) -> None:
    tickets = Tickets(_KEY, clock)
    url, _, made = link("http://127.0.0.1:7020/", _KEY, clock.now).partition("?ticket=")
    assert url == "http://127.0.0.1:7020/login"
    assert tickets.fits(made)
    assert not tickets.fits(ticket(b"other" * 8, clock.now))
    expires, nonce, seal = made.split(".")
    for forged in ("", "guess", "..", f"{int(expires) + 1}.{nonce}.{seal}", f"{expires}.{nonce}x.{seal}", "ä.b.c"):
        assert not tickets.fits(forged)


def test_what_is_old_is_forgotten(clock: Clock) -> None:
    tickets = Tickets(_KEY, clock)
    for _ in range(100):
        assert tickets.use(tickets.new())
        clock.now += 60.0
    assert len(tickets._used) <= 11
