"""`python -m simulation`: runs seeds, replays one, makes its plan shorter. `make simulate` calls it."""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import os
import selectors
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

KEPT: Final = Path(__file__).with_name("kept")
"""Plans that failed once, a file each: the shortest that did, so that it stays the same whatever seeds draw later."""
KNOWN: Final = Path(__file__).with_name("known.txt")
_SEEDS_OF_A_WORKER: Final = 8
"""A worker collects no garbage, and therefore does not live long."""
_HANG_SECONDS: Final = 120
_PROGRESS_SECONDS: Final = 5.0


@dataclass(slots=True)
class Totals:
    """What all seeds together did."""

    seeds: int = 0
    failed: dict[int | str, list[str]] = field(default_factory=dict)
    tolerated: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    profiles: Counter[str] = field(default_factory=Counter)
    sums: Counter[str] = field(default_factory=Counter)

    def add(self, result: dict[str, Any], known: list[str]) -> None:
        """Takes a seed's result in."""
        self.seeds += 1
        self.faults.update(result["faults"])
        self.profiles[result["profile"]] += 1
        for name in ("calls", "decisions", "rows", "operations", "virtual_seconds", "cpu_seconds"):
            self.sums[name] += result[name]
        violations = []
        for violation in result["violations"]:
            mark = next((mark for mark in known if mark in violation), None)
            if mark is None:
                violations.append(violation)
            else:
                self.tolerated[mark] += 1
        if violations:
            self.failed[result["seed"]] = violations


def main() -> int:
    """Runs what is asked for; 0 when nothing failed."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, help="how many seeds, after those that failed before")
    parser.add_argument("--seconds", type=float, help="for how long, instead")
    parser.add_argument("--first", type=int, default=None, help="the first seed; default: by the clock")
    parser.add_argument("--seed", help="replay this one, or this kept plan, and no other")
    parser.add_argument("--profile", help="of every seed, instead of what it draws")
    parser.add_argument("--trace", action="store_true", help="with --seed: every event and every log line")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", metavar="NAME", help="with --seed: keep the shortest failing plan as kept/NAME.json")
    parser.add_argument("--kind", help="with --seed: what the shortest plan must fail with, such as I1")
    parser.add_argument("--all", action="store_true", help="do not pass over what known.txt lists")
    parser.add_argument("--hashes", action="store_true", help="print each seed's trace hash and nothing else")
    parser.add_argument("--until", metavar="WORDS", help="tell only of violations with these words; stop at the first")
    arguments = parser.parse_args()
    # Imported here: only a worker needs all of the server, and a usage error none of it.
    from simulation.vfs import UnavailableError, simulated_sqlite  # noqa: PLC0415

    try:
        simulated_sqlite()
    except UnavailableError as reason:
        print(f"the simulation cannot run here: {reason}")
        return 77
    if arguments.seed is not None:
        return _replay(arguments)
    return _run_many(arguments)


def _known(arguments: argparse.Namespace) -> list[str]:
    if arguments.all or arguments.until or not KNOWN.exists():
        return []
    lines = (line.partition("  #")[0].strip() for line in KNOWN.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _kept() -> list[str]:
    """Names of the plans that failed before."""
    return sorted(path.stem for path in KEPT.glob("*.json"))


def _run_many(arguments: argparse.Namespace) -> int:
    first = int(time.time()) * 1_000 if arguments.first is None else arguments.first
    until = None if arguments.seconds is None else time.monotonic() + arguments.seconds
    count = arguments.seeds if arguments.seeds is not None else (1_000 if until is None else 10**9)
    kept = [] if arguments.hashes or arguments.until else _kept()
    known = _known(arguments)
    words = arguments.until or ""

    def seeds() -> Iterator[int | str]:
        yield from kept
        for seed in range(first, first + count):
            if until is not None and time.monotonic() >= until:
                return
            yield seed

    totals, began = Totals(), time.monotonic()
    said = began
    if not arguments.hashes:
        print(f"seeds from {first} on, and {len(kept)} that failed before; {arguments.jobs} at a time", flush=True)
    hashes = {}
    for result in _work(seeds(), arguments.jobs, arguments.profile):
        result["violations"] = [violation for violation in result["violations"] if words in violation]
        totals.add(result, known)
        hashes[result["seed"]] = result["trace_hash"]
        if (violations := totals.failed.get(result["seed"])) and not arguments.hashes:
            _tell(result, violations)
            if arguments.until:
                break
        if time.monotonic() - said > _PROGRESS_SECONDS and not arguments.hashes:
            said = time.monotonic()
            print(f"{said - began:5.0f} s  {totals.seeds} seeds, {len(totals.failed)} failed", flush=True)
    if arguments.hashes:
        for seed in sorted(hashes):
            print(seed, hashes[seed])
        return 0
    _report(totals, time.monotonic() - began)
    return int(bool(totals.failed))


def _tell(result: dict[str, Any], violations: list[str]) -> None:
    print(f"\n{_named(result['seed'])} ({result['profile']}) fails:")
    for violation in violations[:8]:
        print(f"  {violation[:400]}")
    if len(violations) > 8:
        print(f"  and {len(violations) - 8} more")
    print(f"  again: make simulate SEED={result['seed']}      every event: add TRACE=1")
    print(flush=True)


def _named(seed: int | str) -> str:
    return f"seed {seed}" if isinstance(seed, int) else f"kept plan {seed}"


def _report(totals: Totals, seconds: float) -> None:
    sums = totals.sums
    print(f"\n{totals.seeds} seeds in {seconds:.0f} s, {len(totals.failed)} failed")
    print(f"  profiles    {', '.join(f'{name} {count}' for name, count in totals.profiles.most_common())}")
    print(f"  faults      {', '.join(f'{name} {count}' for name, count in totals.faults.most_common())}")
    print(
        f"  history     {sums['calls']} orders asked, {sums['decisions']} decisions heard, {sums['rows']} audit rows, "
        f"{sums['operations']} changes by operators, {sums['virtual_seconds']:.0f} s of virtual time, "
        f"{1e3 * sums['cpu_seconds'] / max(1, totals.seeds):.0f} ms of CPU a seed"
    )
    print("  checked     I1 to I8, the trading state as a register, keys, breakers, chains, drained and healed")
    for mark, count in totals.tolerated.items():
        print(f"  known       {count} × {mark}")


# Workers


def _work(seeds: Iterator[int | str], jobs: int, profile: str | None) -> Iterator[dict[str, Any]]:
    """Results of seeds, as they come, from worker processes."""
    from simulation.scene import prepare_process  # noqa: PLC0415 - see `main`

    prepare_process()
    with selectors.DefaultSelector() as selector:
        active: dict[int, _Worker] = {}

        def start() -> bool:
            batch = list(itertools.islice(seeds, _SEEDS_OF_A_WORKER))
            if not batch:
                return False
            worker = _Worker(batch, profile)
            active[worker.pipe] = worker
            selector.register(worker.pipe, selectors.EVENT_READ)
            return True

        while len(active) < jobs and start():
            pass
        try:
            while active:
                for key, _ in selector.select():
                    worker = active[key.fd]
                    results, ended = worker.read()
                    yield from results
                    if ended:
                        selector.unregister(key.fd)
                        del active[key.fd]
                        if (lost := worker.reap()) is not None:
                            yield lost
                        start()
        finally:
            for worker in active.values():
                worker.kill()


class _Worker:
    """A process that runs some seeds, one after another."""

    def __init__(self, seeds: list[int | str], profile: str | None) -> None:
        self._rest = list(seeds)
        self._buffer = b""
        self.pipe, theirs = os.pipe()
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self.pipe)
            code = 1
            try:
                _serve(theirs, seeds, profile)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(theirs)

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """What it has found, and whether that is all."""
        data = os.read(self.pipe, 1 << 20)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        results = [json.loads(line) for line in lines]
        for result in results:
            self._rest.remove(result["seed"])
        return results, not data

    def reap(self) -> dict[str, Any] | None:
        """The seed that it died of, as a result."""
        os.close(self.pipe)
        _, status = os.waitpid(self._pid, 0)
        if not status or not self._rest:
            return None
        return _empty(self._rest[0]) | {"violations": [f"died: the worker ended with status {status}"]}

    def kill(self) -> None:
        """Ends it."""
        os.kill(self._pid, 9)
        os.waitpid(self._pid, 0)


def _empty(seed: int | str) -> dict[str, Any]:
    counts = dict.fromkeys(("calls", "decisions", "rows", "operations", "virtual_seconds", "cpu_seconds"), 0)
    return {"seed": seed, "profile": "?", "faults": {}, "trace_hash": ""} | counts


def _serve(pipe: int, seeds: list[int | str], profile: str | None) -> None:
    from simulation.run import run  # noqa: PLC0415 - see `main`

    for seed in seeds:
        faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
        outcome = run(*_chosen(seed, profile))
        faulthandler.cancel_dump_traceback_later()
        result = {"seed": seed} | {
            name: getattr(outcome, name)
            for name in (
                *("profile", "violations", "trace_hash", "faults", "calls", "decisions", "rows", "operations"),
                *("virtual_seconds", "cpu_seconds"),
            )
        }
        os.write(pipe, json.dumps(result).encode() + b"\n")


# One seed


def _chosen(seed: int | str, profile: str | None) -> tuple[int, Any]:
    """The seed and the plan of a number, or of the name of a kept plan."""
    from simulation.plan import plan, unpacked  # noqa: PLC0415 - see `main`

    if isinstance(seed, int):
        return seed, plan(seed, profile)
    content = json.loads((KEPT / f"{seed}.json").read_text())
    return content["seed"], unpacked(content["plan"])


def _replay(arguments: argparse.Namespace) -> int:
    from simulation.plan import packed  # noqa: PLC0415 - see `main`
    from simulation.run import run  # noqa: PLC0415
    from simulation.scene import prepare_process  # noqa: PLC0415
    from simulation.shrink import shortest  # noqa: PLC0415

    prepare_process()
    name = int(arguments.seed) if arguments.seed.isdecimal() else arguments.seed
    seed, chosen = _chosen(name, arguments.profile)
    outcome = run(seed, chosen, keep_trace=arguments.trace)
    print(f"{_named(name)}: {chosen.profile}, servers {chosen.servers}, trace {outcome.trace_hash}")
    if not outcome.violations:
        print("nothing is wrong")
    else:
        chosen = shortest(seed, chosen, {arguments.kind} if arguments.kind else outcome.kinds)
        outcome = run(seed, chosen, keep_trace=arguments.trace)
        if arguments.keep:
            KEPT.mkdir(exist_ok=True)
            content = {"why": outcome.violations[0], "seed": seed, "plan": packed(chosen)}
            (KEPT / f"{arguments.keep}.json").write_text(json.dumps(content, indent=1) + "\n")
        print("the shortest plan that fails so:")
    for step in chosen.steps:
        print(f"  {step}")
    if arguments.trace:
        print(*outcome.lines or (), sep="\n")
    for violation in outcome.violations:
        print(f"VIOLATION {violation}")
    return int(bool(outcome.violations))


if __name__ == "__main__":
    raise SystemExit(main())
