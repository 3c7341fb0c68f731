"""All replicas of a server: by role for those who send rows, by name for those who look at them or steer them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.inference.pool import Role
    from server.inference.replica import Replica


class Replicas(Mapping[str, "Replica"]):
    """The replicas by name, primary first.

    Args:
        primary, secondary: Who serves the champion; no secondary where the primary's endpoints are all there is.
        challengers: The challenger where a canary is served, and any others.
        beside: Those of other models, for who looks at all replicas of a server.
        management: `host:port` of the management services, by the endpoint's name; it changes as endpoints come and go.
    """

    def __init__(
        self,
        primary: Role,
        secondary: Role | None,
        challengers: tuple[Role, ...],
        beside: tuple[Role, ...] = (),
        management: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.primary = primary
        self.secondary = secondary
        self.challengers = challengers
        self._beside = beside
        self.management = management

    @property
    def challenger(self) -> Role:
        """Where a canary is served."""
        return self.challengers[0]

    @property
    def champions(self) -> tuple[Role, ...]:
        """Who serves the model that decides."""
        return (self.primary,) if self.secondary is None else (self.primary, self.secondary)

    @property
    def roles(self) -> tuple[Role, ...]:
        """Everyone, primary first."""
        return (*self.champions, *self.challengers, *self._beside)

    def find(self, name: str) -> Role:
        """The endpoint with this name, or all that serve the role with this name.

        Raises:
            KeyError: There is none.
        """
        return next((role for role in self.roles if role.name == name), None) or self[name]

    @property
    def names(self) -> list[str]:
        """What `find` finds."""
        return list(dict.fromkeys([*self, *(role.name for role in self.roles)]))

    def __getitem__(self, name: str) -> Replica:
        """The endpoint with this name."""
        for replica in self._all():
            if replica.name == name:
                return replica
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        """The names of the endpoints that there are now."""
        return (replica.name for replica in self._all())

    def __len__(self) -> int:
        """How many there are now."""
        return sum(1 for _ in self._all())

    def _all(self) -> Iterator[Replica]:
        return (replica for role in self.roles for replica in role.replicas)
