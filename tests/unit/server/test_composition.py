"""How components are put together: by few arguments, by methods rather than by assignment, and warm when they serve."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
from support.cases import Clock

from pretrade.admin.v1 import admin_pb2
from pretrade.client.cli.worst import faults
from server.composition.app import _health
from server.process.health import Health
from server.settings import Settings

ROOT: Final = Path(__file__).parents[3]
MOST_ARGUMENTS: Final = 14
"""A constructor with more is given parts that belong together, such as `Recording`."""


def sources() -> Iterator[Path]:
    for folder in ("server", "fallback", "feature_cache"):
        yield from sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", [*sources()], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_constructor_takes_a_long_list(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len(given) - 1 <= MOST_ARGUMENTS, f"line {node.lineno}: {len(given) - 1} arguments"


@pytest.mark.parametrize("path", [*sources()], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_puts_its_own_function_into_another_object(path: Path) -> None:
    """A listener is added by a method such as `on_batch`: an assignment would silence the one before it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Attribute) and target.attr.startswith(("on_", "observe")):
                own = isinstance(target.value, ast.Name) and target.value.id == "self"
                assert own, f"line {node.lineno}: {ast.unparse(target)}"


def health_of(primary: SimpleNamespace, explaining: SimpleNamespace, clock: Clock) -> Health:
    """The health of a server with these parts, in which all others are sound."""
    base: Any = SimpleNamespace(
        journal=SimpleNamespace(problem=""),
        shipper=SimpleNamespace(problem="", topic=None),
        feature_cache=SimpleNamespace(connected=True, get=lambda _: object()),
        security=SimpleNamespace(components=dict),
    )
    path: Any = SimpleNamespace(
        control=SimpleNamespace(problem=""),
        models=[
            SimpleNamespace(
                name="default",
                embedded=SimpleNamespace(model=SimpleNamespace(fault="")),
                replicas=SimpleNamespace(roles=(primary,)),
            )
        ],
        tracing=None,
    )
    process: Any = SimpleNamespace(settings=Settings(), clock=clock)
    parts: tuple[Any, Any] = (explaining, SimpleNamespace(set=lambda *_: None))
    return _health(process, base, path, *parts)


def sound_primary() -> SimpleNamespace:
    primary = SimpleNamespace(name="primary", endpoint="somewhere", token=None, tls=None, healthy=True, warm=True)
    primary.replicas, primary.candidates, primary.several, primary.ejected = (primary,), (), False, ""
    return primary


@pytest.mark.parametrize("cold", ["primary", "explanations"])
def test_a_server_is_ready_when_replicas_and_explainer_are_warm(cold: str) -> None:
    primary, clock = sound_primary(), Clock()
    primary.warm = cold != "primary"
    explaining = SimpleNamespace(problem="", warming_up=cold == "explanations")
    health = health_of(primary, explaining, clock)
    clock.now += 60
    health.update()
    assert not health.problems()[cold]
    before = health.ready
    primary.warm, explaining.warming_up = True, False
    health.update()
    assert (before, health.ready) == (False, True)


def test_the_status_leads_to_a_section_about_each_component() -> None:
    health = health_of(sound_primary(), SimpleNamespace(problem="", warming_up=False), Clock())
    for name in health.problems():
        status = admin_pb2.GetStatusResponse(
            ready=True,
            trading_state=admin_pb2.TRADING_STATE_ACTIVE,
            replicas=[admin_pb2.ReplicaStatus(name="primary", healthy=True)],
            components=[admin_pb2.ComponentHealth(name=name, detail="it broke")],
        )
        status.audit.writable = True
        assert "ServerDown" not in [fault.section for fault in faults(status)], name
