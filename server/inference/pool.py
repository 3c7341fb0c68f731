"""Several endpoints that serve one role, and which of them rows that come together go to."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final

from server.inference.replica import Replica

if TYPE_CHECKING:
    from server.inference.outcome import Outcome
    from server.inference.wire import ModelIdentity

_CLEARLY: Final = 0.75
"""Another endpoint is taken where its wait is less than this part of the present one's: an idle one against one whose
batch is under way has two thirds of its wait, and the medians of two that are alike differ by less."""
_NONE_TRIED: Final[frozenset[str]] = frozenset()


class Pool:
    """The endpoints of one role, each a replica with its own connection, breaker, batches and probes.

    A model server takes about as long for one row as for hundreds, so rows that are scattered over endpoints cost as
    many calls as they have endpoints and win nothing. A choice therefore *stays*: rows go to the endpoint of the rows
    before them, until its batch has left, or it is out, and another one is clearly quicker. The other one is drawn at
    random, and the quicker of the two is taken: comparing two is enough to keep all of them evenly loaded ("the power
    of two choices"), and servers that all see the same quickest endpoint do not flood it.

    An endpoint whose last batch failed or was slow is taken only when no other is available, until a batch or one of
    its probes succeeds, which come every 100 ms by then.

    Endpoints may come and go: see `members.py`. One that is left gets no new rows; those that wait there get theirs.

    Args:
        name: The role: `primary`, `secondary` or `challenger`.
        replicas: The endpoints; none as yet where they come and go.
        random: Uniform in [0, 1).
        names: Of all endpoints that it may have; empty for those of the endpoints.
    """

    several: Final = True

    def __init__(
        self, name: str, replicas: Collection[Replica], random: Callable[[], float], names: Collection[str] = ()
    ) -> None:
        self.name = name
        self.replicas: tuple[Replica, ...] = tuple(replicas)
        self.candidates: tuple[Replica, ...] = ()
        """Endpoints that get no rows yet: they have not answered, or are not warm."""
        self.names: Final = tuple(names) or tuple(replica.name for replica in self.replicas)
        self._random = random
        self._listeners: list[Callable[[Outcome, float], None]] = []
        self._welcomes: list[Callable[[Replica], None]] = []
        self._present: Replica | None = None

    @property
    def available(self) -> bool:
        """True when one of the endpoints is."""
        return any(replica.available for replica in self.replicas)

    @property
    def drained(self) -> bool:
        """True when on-call sends no orders to any of them."""
        return bool(self.replicas) and all(replica.drained for replica in self.replicas)

    @property
    def model(self) -> ModelIdentity | None:
        """The model of an endpoint that has answered; None before the first."""
        return next((replica.model for replica in self.replicas if replica.model is not None), None)

    def on_batch(self, listener: Callable[[Outcome, float], None]) -> None:
        """See `Replica.on_batch`."""
        self._listeners.append(listener)
        for replica in self.replicas:
            replica.on_batch(listener)

    def on_join(self, listener: Callable[[Replica], None]) -> None:
        """Registers a function that is called with each endpoint that joins, before it gets its first row."""
        self._welcomes.append(listener)

    def join(self, replica: Replica) -> None:
        """Adds an endpoint."""
        for listener in self._listeners:
            replica.on_batch(listener)
        for welcome in self._welcomes:
            welcome(replica)
        self.replicas = tuple(sorted((*self.replicas, replica), key=lambda one: self.names.index(one.name)))

    def leave(self, replica: Replica) -> None:
        """Sends an endpoint no more rows."""
        self.replicas = tuple(one for one in self.replicas if one is not replica)

    def pick(self, tried: Collection[str] = _NONE_TRIED) -> Replica | None:
        """The endpoint that rows go to now; None when none is available.

        Args:
            tried: Names of those that were asked for these rows before.
        """
        free = [one for one in self.replicas if one.available and one.name not in tried]
        if len(free) > 1:
            free = [one for one in free if not one.breaker.suspicious] or free
        if not free:
            return None
        present = self._present if self._present in free else self._drawn(free)
        others = [one for one in free if one is not present]
        if others:
            other = self._drawn(others)
            if other.wait_seconds < _CLEARLY * present.wait_seconds:
                present = other
        if not tried:
            self._present = present
        return present

    def would_wait(self, rows: int) -> bool:
        """Whether so many rows would not leave yet, at whichever endpoint they went to; False where there is none."""
        free = [one for one in self.replicas if one.available]
        return bool(free) and all(one.would_wait(rows) for one in free)

    def _drawn(self, replicas: list[Replica]) -> Replica:
        return replicas[int(self._random() * len(replicas))]


Role = Replica | Pool
"""Who serves a role: one endpoint, or several."""
