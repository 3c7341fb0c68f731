"""Callers, and the roles that their principals give them."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

MAX_NAME: Final = 200
"""Characters of a caller's name."""


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

Given = Mapping[str, Role | tuple[Role, ...]]
"""Roles by principal."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody whose credentials are good."""

    name: str
    """For the audit: a token's `sub`, or a certificate's first name."""
    roles: frozenset[Role]


CALLER: Final[ContextVar[Caller | None]] = ContextVar("caller", default=None)
"""The caller of the call under way; None where nobody is asked who he is."""


def author(claimed: str) -> str:
    """Who makes a change: the caller where he is known, whatever he claims, or else who he says he is."""
    caller = CALLER.get()
    return claimed if caller is None else caller.name


@dataclass(frozen=True, slots=True)
class Policy:
    """Roles by principal, and principals that are nobody."""

    roles: Given
    denied: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: bytes, given: Given) -> Policy:
        """A policy file's, on top of the roles given by the settings.

        Raises:
            ValueError: It is not what it should be; says where.
        """
        document = json.loads(text)
        if not isinstance(document, dict) or document.keys() - {"roles", "denied"}:
            raise ValueError("must be an object of `roles` and `denied`")
        roles, denied = document.get("roles", {}), document.get("denied", [])
        if not isinstance(roles, dict):
            raise ValueError("roles: must be an object")
        if not isinstance(denied, list) or not all(isinstance(one, str) for one in denied):
            raise ValueError("denied: must be a list of principals")
        read = {name: tuple(Role(role) for role in _listed(value)) for name, value in roles.items()}
        return cls({**given, **read}, frozenset(denied))

    def caller(self, name: str, principals: Iterable[str]) -> Caller | None:
        """The caller with these principals; None when he is denied."""
        roles: set[Role] = set()
        for principal in principals:
            if principal in self.denied:
                return None
            given = self.roles.get(principal, ())
            for role in (given,) if isinstance(given, Role) else given:
                roles |= _INCLUDED[role]
        return Caller(name, frozenset(roles))


def _listed(value: object) -> list[str]:
    return [value] if isinstance(value, str) else list(value) if isinstance(value, list) else [str(value)]
