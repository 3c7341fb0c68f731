"""Orders of one call that were begun together: in columns, a block for each model, or alone."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.decision.decided_block import DecidedBlock
    from server.decision.pending import Waited
    from server.decision.pending_block import OneCall


class PendingSlice:
    """Some orders of a call, and what becomes of each.

    Args:
        size: How many.
    """

    __slots__ = ("_places", "_size", "alone", "blocks")

    def __init__(self, size: int) -> None:
        self._size = size
        self.blocks: list[OneCall] = []
        self._places: list[Sequence[int]] = []
        """Of the orders of each block, in the call's sequence."""
        self.alone: dict[int, Waited] = {}
        """Orders that were begun by themselves, by their places."""

    def add(self, block: OneCall, places: Sequence[int]) -> None:
        """Orders at these places were begun in columns."""
        self.blocks.append(block)
        self._places.append(places)

    async def ended(self) -> None:
        """Waits until each order has its decision, or gets none."""
        for block in self.blocks:
            if not block.future.done():
                await block.future
        for promise in self.alone.values():
            if not promise.done():
                with contextlib.suppress(Exception):  # `outcomes` has it
                    await promise

    def whole(self) -> DecidedBlock | None:
        """The decisions of all these orders, in the call's sequence, where they were made in columns together."""
        if len(self.blocks) != 1 or self.alone or self.blocks[0].apart:
            return None
        return self.blocks[0].decided

    def outcomes(self) -> Sequence[bytes | Waited]:
        """What became of each order, in the call's sequence: its decision, serialised, or the promise that says it."""
        if len(self.blocks) == 1 and not self.alone:
            return list(self.blocks[0].outcomes())
        found: dict[int, bytes | Waited] = dict(self.alone)
        for block, places in zip(self.blocks, self._places, strict=True):
            found.update(zip(places, block.outcomes(), strict=True))
        return [found[place] for place in range(self._size)]

    def take_decided(self) -> list[DecidedBlock]:
        """The decisions that were made in columns. The blocks let go of them: nobody needs both any more."""
        found = [block.decided for block in self.blocks if block.decided is not None and block.in_block]
        for block in self.blocks:
            block.decided = None
        return found
