"""Removes one protection from a copy of the source, and shows that the simulation finds what it prevented.

Each mutation is named after the bug that it brings back, and says which check must find it. `python -m
simulation.mutations` runs them all and prints a table: the seed that found it, and how many were needed. A mutation
whose text is not in the source any more fails: if you changed the code, state here what the protection is now.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

ROOT: Final = Path(__file__).parents[2]
_SOURCES: Final = ("server", "fallback", "feature_cache", "client", "proto/gen", "tests/simulation", "pyproject.toml")
_FAILED: Final = re.compile(r"^(?:seed (\d+)|kept plan (\w+)) \((\w+)\) fails:\n  (.*)", re.M)
_SEEDS: Final = re.compile(r"^(\d+) seeds in", re.M)


@dataclass(frozen=True, slots=True)
class Mutation:
    """One protection that is taken out."""

    bug: str
    """What comes back."""
    path: str
    before: str
    after: str
    finds: str
    """What a violation must contain."""
    profile: str | None = None
    """The profile to look in, where most would not get there."""
    also: tuple[tuple[str, str], ...] = ()
    """Further changes of the same file, from what to what."""


MUTATIONS: Final = (
    Mutation(
        "a halt is lost in a failover of Redis",
        "server/control/model.py",
        "            trading=self.trading.merged(other.trading),\n",
        "            trading=(self if self.version > other.version else other).trading,\n",
        "lost:",
        "control",
    ),
    Mutation(
        "a change whose answer was lost is called refused",
        "server/control/store.py",
        "                in_doubt = in_doubt or error.in_doubt\n",
        "                in_doubt = False\n",
        "told:",
        "control",
    ),
    Mutation(
        "nobody records the change of a process that died",
        "server/control/state.py",
        "                overdue = now - self._unrecorded[change_id] >= _RECORD_SECONDS\n",
        "                overdue = False\n",
        "row:",
        "control",
    ),
    Mutation(
        "a new installation trades",
        "server/control/model.py",
        "    restrictions: Mapping[str, Restriction] = {UNDECIDED.id: UNDECIDED}\n",
        "    restrictions: Mapping[str, Restriction] = {}\n",
        "fresh:",
        "fresh",
    ),
    Mutation(
        "a decision is acknowledged before it is on the disk",
        "server/journal/journal_file.py",
        "PRAGMA synchronous = {'FULL' if sync_commits else 'NORMAL'}",
        "PRAGMA synchronous = NORMAL",
        "was heard and has no row",
        "audit",
    ),
    Mutation(
        "a caller that leaves while its decision is written counts as answered",
        "server/decision/plane.py",
        '            self._replies.unheard(decided, "cancelled")\n',
        "            pass\n",
        "nobody took the reply",
        "audit",
    ),
    Mutation(
        "a caller that leaves a block with its decision written counts as answered",
        "server/decision/many_calls.py",
        "            return self.decided.apart()[place]\n",
        "            return None\n",
        "nobody took the reply",
        "audit",
    ),
    Mutation(
        "the orders of a block are asked of another model than the map chose",
        "server/inference/routed.py",
        "        stage = self._stages.get(block.chosen)\n",
        '        stage = self._stages.get("default")\n',
        "model:",
        "two_models",
    ),
    Mutation(
        "a caller who leaves as its orders fail gives their places back twice",
        "server/decision/pending_block.py",
        "        return len(self._in_block) - len(self._failed)\n",
        "        return len(self._in_block)\n",
        "Value out of range",
        "two_models",
    ),
    Mutation(
        "a decision that missed its deadline counts as replied",
        "server/decision/recorder.py",
        '        self._replies.unheard(decided, "deadline")\n        late = ',
        "        late = ",
        "nobody took the reply",
        "audit",
    ),
    Mutation(
        "what is written after a failed sync rests on pages that are not on the disk",
        "server/journal/journal_file.py",
        '    files.rewrite(path.with_name(f"{path.name}-wal"))\n',
        "    pass\n",
        "I",
        "audit",
    ),
    Mutation(
        "a batch that ends before it is answered counts as heard",
        "server/rpc/batch.py",
        "        for result in batch.results:\n            self._orders.not_sent(result)\n",
        "        for result in batch.results:\n            self._dataplane.heard(result.decisions)\n",
        "its row says it was replied",
        "batches",
        (
            (
                "            self._give_up_slice(one)\n        for order",
                "            for result in self._results_of(one, batch.call):\n"
                "                self._dataplane.heard(result.decisions)\n"
                "        for order",
            ),
        ),
    ),
    Mutation(
        "what a stream that ends has not sent counts as heard",
        "server/rpc/stream.py",
        "                self._orders.not_sent(ready.get_nowait())\n",
        "                self._dataplane.heard(ready.get_nowait().decisions)\n",
        "its row says it was replied",
        "audit",
    ),
    Mutation(
        "a note on a reply is lost with its commit",
        "server/decision/replies.py",
        "                if not note.written:\n                    self._write(decided, note)\n",
        "                if not note.written:\n                    del self._notes[decided]\n"
        "                    self._journal.release(decided)\n",
        "its row says it was replied",
        "audit",
    ),
    Mutation(
        "what a killed process left counts as replied",
        "server/journal/journal.py",
        "                writer.settle_what_was_left(self._left)\n",
        "",
        "its row says it was replied",
        "audit",
    ),
    Mutation(
        "a score that is no number decides",
        "server/inference/flight.py",
        "if not 0.0 <= given.scores[index] <= 1.0:",
        "if False:",
        "I4:",
        "models",
        also=(("return bool(scores.min() >= 0.0 and scores.max() <= 1.0)", "return True"),),
    ),
    Mutation(
        "features of an hour ago decide when a caller brings them",
        "fallback/staleness.py",
        "    return book_age_seconds >= 0.0 and age_seconds + book_age_seconds <= max_age_seconds",
        "    return not age_seconds + book_age_seconds > max_age_seconds or age_seconds == 0.0",
        "I4:",
        "models",
    ),
    Mutation(
        "a book of unknown age decides",
        "fallback/staleness.py",
        "    return book_age_seconds >= 0.0 and age_seconds + book_age_seconds <= max_age_seconds",
        "    return not age_seconds + book_age_seconds > max_age_seconds",
        "known no book's age",
        "models",
    ),
    Mutation(
        "both attempts of a decision go to one replica",
        "server/inference/champion.py",
        "        choices = self._choices(case, seats, (case.asked_of,))\n",
        "        choices = self._choices(case, (self._first,), ())\n",
        "I5:",
        "models",
    ),
    Mutation(
        "a key is decided again",
        "server/decision/idempotency.py",
        "    return KeyedOrder(_hash(whose.encode()), ",
        "    return KeyedOrder(_hash(__import__('os').urandom(8)), ",
        "key:",
        "keys",
    ),
    Mutation(
        "a key that a killed process had decided is decided again",
        "server/decision/left_keys.py",
        "        for left in self._left(packets):\n            while not self._restored(left) and patience:\n",
        "        for left in ():\n            while not self._restored(left) and patience:\n",
        "by a killed process",
        "keys",
    ),
    Mutation(
        "a health watcher that does not read keeps the truth from all others",
        "server/rpc/health.py",
        "        if self._serving.get(service) == serving:\n",
        "        held = any(changed.is_set() for changed in self._watchers.get(service, ()))\n"
        "        if self._serving.get(service) == serving or held:\n",
        "health:",
        "health",
        also=(
            (
                "                    yield status\n",
                "                    changed.set()\n"
                "                    yield status\n"
                "                    changed.clear()\n",
            ),
        ),
    ),
    Mutation(
        "a shipper goes on from what it remembers, not from what the database has",
        "server/audit/shipping/shipping_process.py",
        "        head = store.shipped(journal.journal_id, anchor, self._task.slot)\n",
        "        head = store.shipped(journal.journal_id, anchor, self._task.slot)\n"
        '        head = self.__dict__.setdefault("_head", head)\n',
        "drain:",
        "audit",
    ),
)


@dataclass(frozen=True, slots=True)
class Found:
    """What became of a mutation."""

    mutation: Mutation
    seed: str
    seeds: int
    violation: str
    seconds: float


def find(mutation: Mutation, seeds: int, jobs: int) -> Found:
    """Runs seeds against a copy of the source without the protection, until one fails as it must.

    Raises:
        ValueError: The text of the mutation is not in the source.
    """
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for name in _SOURCES:
            source, target = ROOT / name, copy / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        file = copy / mutation.path
        text = file.read_text()
        for before, after in ((mutation.before, mutation.after), *mutation.also):
            if before not in text:
                raise ValueError(f"{mutation.bug}: {mutation.path} does not hold {before!r}")
            text = text.replace(before, after)
        file.write_text(text)
        path = os.pathsep.join(map(str, (copy / "tests", copy, copy / "client", copy / "proto/gen")))
        command = [
            *(sys.executable, "-m", "simulation", "--first", "0", "--seeds", str(seeds), "--jobs", str(jobs)),
            *("--until", mutation.finds),
            *(() if mutation.profile is None else ("--profile", mutation.profile)),
        ]
        began = time.monotonic()
        done = subprocess.run(
            command, cwd=copy, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        counted = _SEEDS.search(done.stdout)
        count = int(counted[1]) if counted else 0
        for seed, kept, _, violation in _FAILED.findall(done.stdout):
            return Found(mutation, seed or kept, count, violation, time.monotonic() - began)
        if not counted:
            raise ValueError(f"{mutation.bug}: {done.stdout[-500:]}{done.stderr[-500:]}")
        return Found(mutation, "", count, "", time.monotonic() - began)


def main() -> int:
    """Runs all mutations, or those whose name holds some words; 0 when each is found."""
    parser = argparse.ArgumentParser(prog="simulation.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="of the bug's name")
    parser.add_argument("--seeds", type=int, default=1_000, help="most seeds for each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    table = Table("bug that comes back", "found by seed", "of", "with", "s", title="Mutations")
    missed = 0
    for mutation in MUTATIONS:
        if arguments.words and not all(word in mutation.bug for word in arguments.words):
            continue
        found = find(mutation, arguments.seeds, arguments.jobs)
        missed += not found.seed
        row = (mutation.bug, found.seed or "[red]never[/]", str(found.seeds), found.violation[:70])
        table.add_row(*row, f"{found.seconds:.0f}")
        print(*row, flush=True)
    Console().print(table)
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
