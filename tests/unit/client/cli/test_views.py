"""What a terminal shows of a server's status."""

from __future__ import annotations

from rich.console import Console, RenderableType

from pretrade.admin.v1 import admin_pb2
from pretrade.client.cli.views import canary_view, status_view

REASON = "retrained [/] on [red]November[/] data"


def shown(view: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(view)
    return captured.get()


def canary() -> admin_pb2.Canary:
    check = admin_pb2.CanaryCheck(name="rank", limit=0.0, samples=40, canary=0.91, champion=0.09)
    check.verdict = admin_pb2.CANARY_VERDICT_WORSE
    return admin_pb2.Canary(
        model_version="bb" * 8,
        champion_version="aa" * 8,
        state=admin_pb2.CANARY_STATE_RUNNING,
        weight=0.05,
        steps=[0.01, 0.05, 1.0],
        step=1,
        author="ann",
        reason=REASON,
        verdict=admin_pb2.CANARY_VERDICT_WORSE,
        verdict_reason="rank 0.91 against 0.09",
        checks=[check],
    )


def test_the_status_shows_the_canary_with_its_evidence() -> None:
    status = admin_pb2.GetStatusResponse(instance_id="one", ready=True, trading_state=admin_pb2.TRADING_STATE_ACTIVE)
    assert "canary" not in shown(status_view(status))
    status.canary.CopyFrom(canary())
    text = shown(status_view(status))
    assert "5% of the flows" in text
    assert "rank 0.91 against 0.09" in text
    assert any(line.split("│")[1:3] == [" rank  ", " 0.91   "] for line in text.splitlines()), text


def test_the_status_says_which_model_is_embedded_or_why_none_is() -> None:
    status = admin_pb2.GetStatusResponse(instance_id="one", trading_state=admin_pb2.TRADING_STATE_ACTIVE)
    status.embedded.problem = "no model: this server has no model store"
    assert "embedded: no model: this server has no model store" in shown(status_view(status))
    status.embedded.problem, status.embedded.model_version = "", "aa" * 8
    assert f"embedded: model {'aa' * 8}" in shown(status_view(status))


def test_what_people_and_errors_say_is_shown_as_it_is() -> None:
    status = admin_pb2.GetStatusResponse(instance_id="one", trading_state=admin_pb2.TRADING_STATE_HALTED)
    status.components.add(name="journal", healthy=False, detail="[/dev/sdb1] is full")
    status.audit.last_error = "[/var/lib] is read-only"
    text = shown(status_view(status))
    assert "[/dev/sdb1] is full" in text
    assert "[/var/lib] is read-only" in text
    assert REASON in shown(canary_view(canary()))


def test_the_status_says_how_good_the_champion_is_known_to_be() -> None:
    status = admin_pb2.GetStatusResponse(instance_id="one", trading_state=admin_pb2.TRADING_STATE_ACTIVE)
    assert "champion" not in shown(status_view(status))
    status.champion.model_version, status.champion.standing = "aa" * 8, "does not beat the rules"
    status.champion.card = "models/cards/card.md"
    assert "champion aaaaaaaa: does not beat the rules; card: models/cards/card.md" in shown(status_view(status))
