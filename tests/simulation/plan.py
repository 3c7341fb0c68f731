"""What a seed has happen: a list of steps, drawn before anything runs, so that a failing list can be made shorter.

A seed first draws a *profile*, which says how many servers there are and what they are asked, and then, of everything
that can go wrong, which kinds do in this run ("swarm testing"): runs of few kinds of faults reach deeper than runs of
all kinds at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any, Final

from simulation.guest import MODEL

CALLERS: Final = ("desk-a", "desk-b", "desk-c")
POOL: Final = ("127.0.0.1:7070", "127.0.0.1:7071", "127.0.0.1:7072", "127.0.0.1:7073")
"""The endpoints of a primary that is a pool."""
_POOLS: Final = 0.4
"""Of the plans about models, the share with a pool."""
_SECOND: Final = 0.3
"""Of the plans about batches and the audit, the share with a second model."""
_TIMEOUTS: Final = (1e-9, 0.002, 0.006, 0.01, 0.02, 0.025, 0.03, 0.05, 0.1, 0.3, None)


@dataclass(frozen=True, slots=True)
class Step:
    """Something that is going to happen."""

    at: float
    """Seconds after the beginning."""
    kind: str
    what: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        what = " ".join(f"{name}={value}" for name, value in self.what.items())
        return f"{self.at:7.3f} s  {self.kind} {what}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole run."""

    profile: str
    servers: tuple[tuple[str, str], ...]
    """Name and edge of each."""
    seconds: float
    """When everything is healed."""
    steps: tuple[Step, ...]
    settings: Mapping[str, Mapping[str, Any]]


def packed(chosen: Plan) -> dict[str, Any]:
    """A plan as JSON can hold it."""
    return asdict(chosen)


def unpacked(content: Mapping[str, Any]) -> Plan:
    """The plan that was packed."""
    return Plan(
        profile=content["profile"],
        servers=tuple((name, edge) for name, edge in content["servers"]),
        seconds=content["seconds"],
        steps=tuple(Step(one["at"], one["kind"], one["what"]) for one in content["steps"]),
        settings=content["settings"],
    )


@dataclass(frozen=True, slots=True)
class _Profile:
    weight: float
    """How often it is drawn, against the others."""
    servers: tuple[int, int]
    """Least and most."""
    calls: tuple[int, int]
    """Least and most, of operations as well."""
    asked: Mapping[str, float]
    """How often each kind of call or operation is drawn, against the others."""
    faults: Mapping[str, float]
    """How likely each kind of fault is part of the run."""
    seconds: tuple[float, float] = (1.0, 2.5)


_REDIS: Final = {
    "fail_over": 0.5,
    "redis_restart": 0.2,
    "redis_wipe": 0.2,
    "redis_stall": 0.3,
    "lost_reply": 0.5,
    "lost_request": 0.2,
    "link_down": 0.4,
    "replies_stuck": 0.3,
}
_DISK: Final = {"disk_slow": 0.4, "disk_stuck": 0.4, "sync_fails": 0.4, "write_fails": 0.2, "disk_full": 0.3}
_PROCESS: Final = {"kill": 0.3, "power": 0.4, "term": 0.2, "stop": 0.2, "stall": 0.3}
_MODELS: Final = {"model_down": 0.4, "model_hangs": 0.3, "model_nan": 0.4, "model_fails": 0.3, "model_slow": 0.3}
_ENDPOINTS: Final = {"endpoints_down": 0.5, "endpoint_slow": 0.6, "endpoints_hang": 0.3}
_DATABASE: Final = {"database_down": 0.3, "commit_lost": 0.3}
_MARKET: Final = {"market_stops": 0.3, "book_dies": 0.3, "book_age_nan": 0.3}
_CLOCK: Final = {"clock_steps": 0.5}
_ALL: Final = _REDIS | _DISK | _PROCESS | _MODELS | _DATABASE | _MARKET | _CLOCK

PROFILES: Final[Mapping[str, _Profile]] = {
    "control": _Profile(
        3.0,
        servers=(2, 3),
        calls=(10, 20),
        asked={"unary": 6, "key": 2, "state": 6, "flag": 2},
        faults=_REDIS | _PROCESS | _CLOCK | {"sync_fails": 0.1, "disk_slow": 0.1, "lonely_halt": 0.3},
        seconds=(2.0, 4.0),
    ),
    "audit": _Profile(
        3.0,
        servers=(1, 1),
        calls=(15, 40),
        asked={"unary": 8, "stream": 3, "key": 2, "small_batch": 1, "deaf_watcher": 1},
        faults=_DISK | _PROCESS | _DATABASE | {"model_slow": 0.2},
    ),
    "batches": _Profile(
        1.0,
        servers=(1, 1),
        calls=(2, 4),
        asked={"batch": 3, "stream": 1},
        faults={"disk_slow": 0.3, "disk_stuck": 0.2, "stall": 0.3},
    ),
    "keys": _Profile(
        1.0,
        servers=(1, 1),
        calls=(15, 35),
        asked={"key": 9, "key_stream": 3, "state": 1},
        faults={"disk_slow": 0.4, "model_slow": 0.4, "stall": 0.4, "disk_stuck": 0.3, "kill": 0.3},
    ),
    "models": _Profile(
        1.5,
        servers=(1, 1),
        calls=(20, 40),
        asked={"unary": 8, "own": 3, "key": 1},
        faults=_MODELS | _MARKET | _CLOCK | {"stall": 0.3},
    ),
    "pool": _Profile(
        0.0,  # a part of what would be `models`, see `plan`
        servers=(1, 1),
        calls=(150, 300),
        asked={"unary": 8, "small_batch": 1, "key": 1},
        faults=_ENDPOINTS | {"stall": 0.2},
    ),
    "two_models": _Profile(
        0.0,  # a part of what would be `batches` or `audit`, see `plan`
        servers=(1, 1),
        calls=(8, 20),
        asked={"small_batch": 6, "batch": 1, "stream": 1, "unary": 2, "key": 1, "map": 1, "flag": 0.5},
        faults=_MODELS
        | {"guest_stops": 0.4, "market_stops": 0.2, "stall": 0.3, "disk_slow": 0.3, "disk_stuck": 0.3}
        | {"sync_fails": 0.2, "kill": 0.15},
    ),
    "fresh": _Profile(
        0.5,
        servers=(1, 2),
        calls=(5, 10),
        asked={"unary": 1},
        faults={"link_down": 0.3, "power": 0.2},
        seconds=(0.5, 1.0),
    ),
    "health": _Profile(
        0.5,
        servers=(1, 1),
        calls=(4, 10),
        asked={"unary": 2, "deaf_watcher": 2},
        faults={"journal_away": 1.0, "link_down": 0.3},
        seconds=(2.5, 3.5),
    ),
    "everything": _Profile(
        1.0,
        servers=(2, 2),
        calls=(15, 30),
        asked={"unary": 8, "stream": 2, "key": 3, "small_batch": 1, "state": 3, "flag": 1, "own": 1},
        faults={kind: share / 2 for kind, share in _ALL.items()},
        seconds=(1.5, 3.0),
    ),
}


def plan(seed: int, profile: str | None = None) -> Plan:
    """What a seed has happen.

    Args:
        seed: Determines it.
        profile: Instead of the one that the seed draws.
    """
    chance = Random(f"plan/{seed}")
    drawn = chance.choices(list(PROFILES), [one.weight for one in PROFILES.values()])[0]
    if drawn == "models" and Random(f"pool/{seed}").random() < _POOLS:
        drawn = "pool"
    if drawn in {"batches", "audit"} and Random(f"second/{seed}").random() < _SECOND:
        drawn = "two_models"
    name = profile or drawn
    chosen = PROFILES[name]
    servers = tuple((letter, chance.choice(("grpcio", "envoy"))) for letter in "abc"[: chance.randint(*chosen.servers)])
    hosts = [letter for letter, _ in servers]
    seconds = chance.uniform(*chosen.seconds)
    steps: list[Step] = []
    if name != "fresh":
        steps.append(Step(0.0, "state", {"server": hosts[0], "value": "ACTIVE", "expires": None}))
    kinds, weights = list(chosen.asked), list(chosen.asked.values())
    for _ in range(chance.randint(*chosen.calls)):
        kind = chance.choices(kinds, weights)[0]
        at = chance.uniform(0.05, seconds)
        steps.append(Step(at, kind, {"server": chance.choice(hosts)} | _ASKED[kind](chance)))
    for kind, share in chosen.faults.items():
        if chance.random() >= share:
            continue
        for _ in range(chance.choice((1, 1, 1, 2))):
            at = chance.uniform(0.1, seconds)
            what = _FAULTS[kind](chance, max(0.01, seconds - at))
            if kind not in _OF_NO_SERVER:
                what = {"server": chance.choice(hosts)} | what
            steps.append(Step(at, kind, what))
    if name == "two_models":
        steps.append(Step(0.01, "map", {"server": hosts[0], "strategies": chance.sample(CALLERS, 1)}))
    settings: dict[str, dict[str, Any]] = {}
    if chance.random() < 0.2:
        settings["journal"] = {"max_mebibytes": 1}
    if name == "pool":
        settings["replicas"] = {"primary": ",".join(POOL)}
    if name == "two_models":
        settings["models"] = {MODEL: {}}
    steps.sort(key=lambda step: step.at)
    return Plan(name, servers, seconds, tuple(steps), settings)


# Calls and operations


def _leaves(chance: Random) -> float | None:
    return chance.uniform(0.0005, 0.03) if chance.random() < 0.15 else None


def _unary(chance: Random) -> dict[str, Any]:
    return {
        "caller": chance.choice(CALLERS),
        "timeout": chance.choice(_TIMEOUTS),
        "leaves": _leaves(chance),
        "reduce_only": chance.random() < 0.1,
    }


def _own(chance: Random) -> dict[str, Any]:
    """An order with features of its caller's own."""
    ages = (0.0, 100.0, 900.0, 1_500.0, 3_600_000.0)
    return {
        "caller": chance.choice(CALLERS),
        "timeout": chance.choice(_TIMEOUTS[4:]),
        "book_age_ms": chance.choice(ages),
    }


def _key(chance: Random) -> dict[str, Any]:
    """An order with a key, and its repeats."""
    return {
        "caller": chance.choice(CALLERS),
        "timeout": chance.choice(_TIMEOUTS[2:]),
        "leaves": _leaves(chance),
        "key": str(chance.randint(1, 3)),
        "again_after": [chance.uniform(0, chance.choice((0.05, 2.0))) for _ in range(chance.randint(1, 3))],
    }


def _small_batch(chance: Random) -> dict[str, Any]:
    return {
        "caller": chance.choice(CALLERS),
        "timeout": chance.choice(_TIMEOUTS[3:]),
        "leaves": _leaves(chance),
        "orders": chance.randint(1, 8),
    }


def _batch(chance: Random) -> dict[str, Any]:
    """More orders than are decided at once."""
    return {
        "caller": chance.choice(CALLERS),
        "timeout": chance.choice(_TIMEOUTS[6:]),
        "leaves": chance.uniform(0.002, 0.05) if chance.random() < 0.5 else None,
        "orders": chance.randint(65, 140),
    }


def _stream(chance: Random, key: str | None = None) -> dict[str, Any]:
    return {
        "caller": chance.choice(CALLERS),
        "orders": chance.randint(1, 10),
        "gap": chance.choice((0.0, 0.0, 0.001, 0.02)),
        "window": chance.choice((math.inf, math.inf, 0, 300)),
        "closes": chance.uniform(0.001, 0.1) if chance.random() < 0.5 else None,
        "reads": chance.uniform(0.005, 0.2) if chance.random() < 0.7 else None,
        "key": key,
    }


def _state(chance: Random) -> dict[str, Any]:
    value = chance.choice(("ACTIVE", "ACTIVE", "REDUCING", "HALTED", "HALTED", "HALTED"))
    expires = chance.uniform(0.2, 2.0) if value != "ACTIVE" and chance.random() < 0.15 else None
    return {"value": value, "expires": expires}


def _flag(chance: Random) -> dict[str, Any]:
    return {"name": chance.choice(("shadow", "cached_score")), "on": chance.random() < 0.5}


_ASKED: Final[Mapping[str, Callable[[Random], dict[str, Any]]]] = {
    "unary": _unary,
    "own": _own,
    "key": _key,
    "small_batch": _small_batch,
    "batch": _batch,
    "stream": _stream,
    "key_stream": lambda chance: _stream(chance, str(chance.randint(1, 3))),
    "state": _state,
    "flag": _flag,
    "map": lambda chance: {"strategies": chance.sample(CALLERS, chance.randint(0, len(CALLERS)))},
    "deaf_watcher": lambda chance: {"service": chance.choice(("", "", "journal", "primary"))},
}


# Faults; each is told what is left of the run, in seconds


def _lasting(chance: Random, left: float) -> dict[str, Any]:
    """A fault that heals by itself."""
    return {"lasts": min(chance.choice((0.02, 0.1, 0.4, 1.0)) * chance.uniform(0.5, 1.5), left)}


def _dying(chance: Random, _left: float) -> dict[str, Any]:
    """A process or Redis that comes back."""
    return {"down": chance.uniform(0.02, 0.5)}


def _few(chance: Random, _left: float) -> dict[str, Any]:
    """So many times."""
    return {"times": chance.choice((1, 1, 3))}


def _nothing(_chance: Random, _left: float) -> dict[str, Any]:
    return {}


def _fail_over(chance: Random, _left: float) -> dict[str, Any]:
    return {"lag": chance.choice((0.005, 0.1, 1.0)), "down": chance.uniform(0.05, 0.8)}


def _lonely_halt(chance: Random, _left: float) -> dict[str, Any]:
    return _fail_over(chance, _left) | {"lag": chance.uniform(0.1, 0.5), "behind": chance.choice((0.0, 0.3, 1.0))}


def _step(chance: Random, _left: float) -> dict[str, Any]:
    return {"seconds": chance.choice((-3600.0, -5.0, -0.5, 0.5, 3600.0))}


def _slow(chance: Random, left: float) -> dict[str, Any]:
    return _lasting(chance, left) | {"slowest": chance.choice((0.005, 0.02, 0.05, 0.2))}


def _unsteady(chance: Random, left: float) -> dict[str, Any]:
    """A disk whose syncs all fail, or now and then one."""
    return _lasting(chance, left) | {"share": chance.choice((1.0, 1.0, 0.7, 0.4))}


def _model(chance: Random, left: float) -> dict[str, Any]:
    which = chance.choice(("primary", "secondary", "both"))
    return {"which": which, "fatal": chance.random() < 0.5} | _lasting(chance, left)


def _endpoints(chance: Random, left: float) -> dict[str, Any]:
    """Two of the primary's four."""
    return {"which": sorted(chance.sample(range(len(POOL)), 2)), "lasts": min(chance.uniform(0.2, 1.0), left)}


def _endpoint(chance: Random, left: float) -> dict[str, Any]:
    """One of them, which takes twenty times as long, or a hundred times."""
    what = {"which": chance.randrange(len(POOL)), "slow": chance.choice((20, 100))}
    return what | {"lasts": min(chance.uniform(0.3, 1.0), left)}


_FAULTS: Final[Mapping[str, Callable[[Random, float], dict[str, Any]]]] = {
    "fail_over": _fail_over,
    "lonely_halt": _lonely_halt,
    **dict.fromkeys(("redis_restart", "redis_wipe", "kill", "power", "term"), _dying),
    **dict.fromkeys(("lost_reply", "lost_request", "commit_lost"), _few),
    **dict.fromkeys(("redis_stall", "link_down", "replies_stuck", "stall", "stop"), _lasting),
    **dict.fromkeys(("disk_stuck", "write_fails", "disk_full"), _lasting),
    **dict.fromkeys(("database_down", "market_stops"), _lasting),
    **dict.fromkeys(("book_dies", "book_age_nan", "guest_stops"), _nothing),
    **dict.fromkeys(_MODELS, _model),
    "endpoint_slow": _endpoint,
    **dict.fromkeys(("endpoints_down", "endpoints_hang"), _endpoints),
    "journal_away": lambda chance, left: {"lasts": chance.uniform(1.3, 2.5)},
    "clock_steps": _step,
    "disk_slow": _slow,
    "sync_fails": _unsteady,
}
_OF_NO_SERVER: Final = frozenset(
    (
        "fail_over",
        "redis_restart",
        "redis_wipe",
        "redis_stall",
        "guest_stops",
        *_DATABASE,
        *_MARKET,
        *_MODELS,
        *_ENDPOINTS,
    )
)
