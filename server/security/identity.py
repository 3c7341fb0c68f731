"""Callers, and what their principals allow them: roles, strategies and rates."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

MAX_NAME: Final = 200
"""Characters of a caller's name."""
_MAX_REMEMBERED: Final = 10_000


class Role(enum.StrEnum):
    """What a caller may be."""

    TRADER = "trader"
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


_INCLUDED: Final = {
    Role.TRADER: {Role.TRADER},
    Role.VIEWER: {Role.VIEWER},
    Role.OPERATOR: {Role.OPERATOR, Role.VIEWER},
    Role.ADMIN: set(Role),
}

Principal = Annotated[str, Field(pattern=r"^(sub|claim|uri|dns|cn):.+$", max_length=300)]
PrincipalOrRole = Annotated[str, Field(pattern=r"^((sub|claim|uri|dns|cn):.+|role:[a-z]+)$", max_length=300)]
StrategyPattern = Annotated[str, Field(min_length=1, max_length=64)]
"""A strategy's name, in which `*` stands for any characters."""


class RateTier(BaseModel):
    """How much callers may ask for a second. What is not given is as for everybody."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    decisions_per_second: float | None = Field(default=None, gt=0, le=1e6)
    """Orders a second that one caller may ask about."""
    admin_calls_per_second: float | None = Field(default=None, gt=0, le=1e6)
    """Calls a second of one caller of the admin port."""


Roles = Mapping[Principal, Role | tuple[Role, ...]]
Strategies = Mapping[Principal, StrategyPattern | tuple[StrategyPattern, ...]]
Tiers = Mapping[PrincipalOrRole, RateTier]


@dataclass(frozen=True, slots=True)
class Grants:
    """What a caller may do, as the policy in force says."""

    roles: frozenset[Role]
    strategies: re.Pattern[str] | None
    """Matches the names of strategies that the caller may use; None for any name."""
    decisions_per_second: float | None
    """None for any number."""
    admin_calls_per_second: float

    def allow_strategy(self, strategy: str) -> bool:
        """True when orders of this strategy may be asked about."""
        return self.strategies is None or self.strategies.fullmatch(strategy) is not None


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a call shows of itself before its request is read."""

    method: str
    """`/package.Service/Method`."""
    authorization: str
    """The header's value; empty without."""
    peer: Callable[[], str]
    """The address it came from, without the port; `unix:…` for a socket of this machine."""
    certificate: Callable[[], bytes | None]
    """The client's certificate in PEM, verified by the transport; None without."""


@dataclass(slots=True, eq=False)
class Caller:
    """Who makes one call, and what it may do. A stream may outlive a policy: then its caller gets other grants."""

    name: str
    """For the audit: what a token's `name_claim` says, or a certificate's first name."""
    grants: Grants
    """What the policy allows."""
    attempt: Attempt
    """How it was let in."""
    stands_for_others: bool = False
    """True for credentials of a machine and not of a person: then the caller says who it is."""


def known_name(caller: Caller | None, claimed: str) -> str:
    """Who makes a change or a report: the caller where it is known, whatever it claims, or else who it says it is."""
    return claimed if caller is None or caller.stands_for_others else caller.name


def longest_name(caller: Caller | None, for_claimed: int) -> int:
    """Most characters of the name that `known_name` returns: what is claimed may be shorter than what is proven."""
    return for_claimed if caller is None or caller.stands_for_others else MAX_NAME


@dataclass(frozen=True, slots=True)
class Policy:
    """What principals are allowed, and which principals are denied everything.

    `strategies` is None if no caller is restricted to strategies. With a mapping, even an empty one, a caller may use
    only the strategies of its principals.
    """

    roles: Roles = field(default_factory=dict)
    strategies: Strategies | None = None
    rates: Tiers = field(default_factory=dict)
    general_rate: RateTier = field(default_factory=RateTier)
    """For callers and amounts that no tier names."""
    denied: frozenset[str] = frozenset()
    _known: dict[tuple[str, ...], Grants | None] = field(default_factory=dict, compare=False, repr=False)

    def with_file(self, text: bytes) -> Policy:
        """This policy, which the settings give, with a policy file's entries on top.

        Raises:
            ValueError: The file is not what it should be; says where.
        """
        try:
            read = _FILE.validate_json(text, strict=False)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}") from None
        strategies = self.strategies
        if read.strategies is not None:
            strategies = {**(strategies or {}), **read.strategies}
        return replace(
            self,
            roles={**self.roles, **read.roles},
            strategies=strategies,
            rates={**self.rates, **read.rates},
            denied=self.denied | read.denied,
            _known={},
        )

    def grants(self, principals: tuple[str, ...]) -> Grants | None:
        """What a caller with these principals may do; None when it is denied."""
        if principals not in self._known:
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            self._known[principals] = self._worked_out(principals)
        return self._known[principals]

    def _worked_out(self, principals: Sequence[str]) -> Grants | None:
        if not self.denied.isdisjoint(principals):
            return None
        roles: set[Role] = set()
        for principal in principals:
            for role in _listed(self.roles.get(principal, ())):
                roles |= _INCLUDED[Role(role)]
        tiers = [self.rates[principal] for principal in principals if principal in self.rates]
        of_roles = [self.rates[key] for role in roles if (key := f"role:{role}") in self.rates]
        return Grants(
            frozenset(roles),
            self._patterns(principals),
            self._rate("decisions_per_second", tiers, of_roles),
            self._rate("admin_calls_per_second", tiers, of_roles) or math.inf,
        )

    def _patterns(self, principals: Iterable[str]) -> re.Pattern[str] | None:
        if self.strategies is None:
            return None
        patterns = [pattern for name in principals for pattern in _listed(self.strategies.get(name, ()))]
        return re.compile("|".join(".*".join(map(re.escape, one.split("*"))) for one in patterns) or "(?!)", re.DOTALL)

    def _rate(self, what: str, tiers: Iterable[RateTier], of_roles: Iterable[RateTier]) -> float | None:
        """The first principal's tier that says it, else the largest of the roles', else the general one."""
        for tier in tiers:
            if (rate := getattr(tier, what)) is not None:
                return float(rate)
        rates = [rate for tier in of_roles if (rate := getattr(tier, what)) is not None]
        general: float | None = getattr(self.general_rate, what)
        return max(rates) if rates else general


class _File(BaseModel):
    """A policy file."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    roles: Roles = {}
    strategies: Strategies | None = None
    rates: Tiers = {}
    denied: frozenset[Principal] = frozenset()


_FILE: Final[TypeAdapter[_File]] = TypeAdapter(_File)


def _listed(value: Any) -> Iterable[str]:
    return (value,) if isinstance(value, str) else value
