"""What a policy allows: strategies by pattern, and rates by caller or role."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_cache.token_bucket import TokenBuckets
from server.errors import PermissionDeniedError, RateLimitedError
from server.rpc import status
from server.security.identity import Attempt, Caller, Grants, Policy, Role
from server.security.orders import OrderAccess
from server.security.refusals import Refusals
from server.security.settings import AccessSettings

_ATTEMPT = Attempt("/pretrade.decision.v1.DecisionService/Decide", "", lambda: "10.0.0.7", lambda: None)


def grants(*principals: str, **access: Any) -> Grants:
    found = AccessSettings.model_validate(access).base_policy().grants(principals)
    assert found is not None
    return found


def test_without_bindings_a_caller_may_use_any_strategy() -> None:
    assert grants("sub:alice").allow_strategy("whatever")


@pytest.mark.parametrize(
    ("strategy", "allowed"),
    [
        ("twap-eu", True),
        ("twap-", True),
        ("vwap", True),
        ("twap", False),
        ("Twap-eu", False),
        ("vwap-2", False),
        ("x-twap-eu", False),
        ("twap-\n", True),
        ("close.auction", True),
        ("closeXauction", False),
    ],
)
def test_a_caller_may_use_what_its_principals_are_bound_to(strategy: str, allowed: bool) -> None:
    bound = {"sub:alice": ["twap-*", "vwap"], "claim:desk": "close.auction", "sub:bob": "*"}
    assert grants("sub:alice", "claim:desk", strategies=bound).allow_strategy(strategy) is allowed
    assert grants("sub:bob", strategies=bound).allow_strategy(strategy)
    assert not grants("sub:eve", strategies=bound).allow_strategy(strategy), "bound to nothing"


def test_an_empty_binding_leaves_it_to_the_policy_file() -> None:
    base = AccessSettings.model_validate({"strategies": {}}).base_policy()
    alice = base.grants(("sub:alice",))
    assert alice is not None
    assert not alice.allow_strategy("twap")
    filed = base.with_file(b'{"strategies": {"sub:alice": "twap"}}').grants(("sub:alice",))
    assert filed is not None
    assert filed.allow_strategy("twap")
    without = base.with_file(b'{"denied": []}').grants(("sub:alice",))
    assert without is not None
    assert not without.allow_strategy("twap"), "a file that forgets the bindings frees nobody"


@given(name=st.text(min_size=1, max_size=20), other=st.text(min_size=1, max_size=20))
def test_a_name_without_a_star_is_that_name_alone(name: str, other: str) -> None:
    found = grants("sub:a", strategies={"sub:a": name.replace("*", ".")})
    assert found.allow_strategy(name.replace("*", "."))
    assert found.allow_strategy(other) == (other == name.replace("*", "."))


def test_a_rate_is_that_of_the_principal_or_the_role_or_everybodys() -> None:
    access: dict[str, Any] = {
        "decisions_per_second": 10,
        "admin_calls_per_second": 5,
        "roles": {"sub:mm": ["trader", "viewer"], "sub:alice": "trader", "sub:root": "admin"},
        "rates": {
            "sub:mm": {"decisions_per_second": 5_000},
            "role:trader": {"decisions_per_second": 100, "admin_calls_per_second": 1},
            "role:viewer": {"admin_calls_per_second": 20},
            "role:admin": {"decisions_per_second": 50},
        },
    }

    def rates(*principals: str) -> tuple[float | None, float]:
        found = grants(*principals, **access)
        return found.decisions_per_second, found.admin_calls_per_second

    assert rates("sub:mm") == (5_000, 20), "its own, and the highest of its roles'"
    assert rates("sub:alice") == (100, 1)
    assert rates("sub:root") == (100, 20), "an admin is a trader and a viewer as well"
    assert rates("sub:nobody") == (10, 5)
    unlimited = grants("sub:nobody")
    assert unlimited.decisions_per_second is None
    assert unlimited.admin_calls_per_second == 50.0
    alone = Policy().grants(("sub:a",))
    assert alone is not None
    assert alone.admin_calls_per_second == math.inf


def order_access() -> tuple[OrderAccess, Refusals]:
    async def record(entry: bytes) -> None:
        return None

    refusals = Refusals(record, TokenBuckets(1e-9, 1.0, lambda: 0.0), "test", lambda: 0)
    refusals._rates.take("")  # nothing more is recorded, and no event loop needed
    return OrderAccess(TokenBuckets(math.inf, 2.0, lambda: 0.0), refusals), refusals


def test_an_order_of_anothers_strategy_is_refused_by_its_name() -> None:
    access, refusals = order_access()
    bound = grants("sub:alice", strategies={"sub:alice": "twap-*"})
    alice = Caller("alice", bound, _ATTEMPT)
    access.check_strategy(alice, "twap-1")
    with pytest.raises(PermissionDeniedError) as error:
        access.check_strategy(alice, "vwap")
    assert (error.value.reason, error.value.field) == ("STRATEGY_NOT_ALLOWED", "strategy")
    assert "'vwap'" in str(error.value)
    assert refusals.counts["decision", "STRATEGY_NOT_ALLOWED"] == 1
    code, _, trailing = status.of(error.value)
    assert code.name == "PERMISSION_DENIED"
    assert b"vwap" in bytes(trailing[0][1])  # type: ignore[arg-type]  # a binary header
    access.check_strategy(None, "vwap")


def test_a_stream_goes_by_the_grants_of_now() -> None:
    access, _ = order_access()
    caller = Caller("alice", grants("sub:alice", strategies={"sub:alice": "twap"}, decisions_per_second=1), _ATTEMPT)
    access.check_strategy(caller, "twap")
    access.charge(caller)
    access.charge(caller)
    with pytest.raises(RateLimitedError):
        access.charge(caller)
    caller.grants = grants("sub:alice", strategies={"sub:alice": "vwap"})
    access.check_strategy(caller, "vwap")
    access.charge(caller)
    with pytest.raises(PermissionDeniedError):
        access.check_strategy(caller, "twap")


def test_roles_include_others() -> None:
    assert grants("sub:a", roles={"sub:a": "operator"}).roles == {Role.OPERATOR, Role.VIEWER}
