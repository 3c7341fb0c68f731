"""Shows the start and the end of a stack in a terminal."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from local.stack.errors import PartFailedError
from local.stack.stack import PARTS, Progress, Stack

_MARKS: Final = {"ready": "[green]✓[/]", "external": "[blue]→[/]", "failed": "[red]✗[/]", "stopped": "[dim]■[/]"}


class ProgressLines:
    """A line for each step that has come to something, and below them what is under way; while it is entered.

    In a log file or a pipe there are only the lines.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._lock = threading.Lock()
        self._under_way: dict[str, Progress] = {}

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.stop()

    def __call__(self, progress: Progress) -> None:
        """Shows one change; may be called from any thread."""
        with self._lock:
            if progress.state in ("starting", "stopping"):
                self._under_way[progress.step] = progress
                if progress.detail and not self._console.is_terminal:  # where there is no line that changes
                    self._console.print(
                        f"  {progress.step}: {escape(progress.detail)}", highlight=False, soft_wrap=True
                    )
            else:
                self._under_way.pop(progress.step, None)
                self._print(progress)
            self._status.update(escape(", ".join(map(_under_way, self._under_way.values()))))

    def _print(self, progress: Progress) -> None:
        took = "" if progress.state == "external" else f"{progress.seconds:.1f} s"
        self._console.print(
            f"{_MARKS[progress.state]} {progress.step:<10} {progress.state:<8} {took:>7}  {escape(progress.detail)}",
            highlight=False,
            soft_wrap=True,
        )


def _under_way(progress: Progress) -> str:
    return f"{progress.state} {progress.step}" + (f" ({progress.detail})" if progress.detail else "")


def running(stack: Stack) -> Table:
    """What runs where, and the memory it takes."""
    memory = stack.memory_bytes()
    endpoints = stack.endpoints
    where = {
        "valkey": endpoints.redis_address,
        "broker": endpoints.kafka_bootstrap_servers,
        "postgres": endpoints.database_address,
        "primary": endpoints.primary,
        "secondary": endpoints.secondary,
        "challenger": endpoints.challenger,
        "worker": endpoints.worker_url,
        "console": endpoints.console_url,
        "server": f"{endpoints.decision}, admin {endpoints.admin}, {endpoints.http_url}, "
        f"{endpoints.metrics_url}/metrics",
    }
    table = Table(box=None, header_style="dim")
    table.add_column("part")
    table.add_column("address", overflow="fold")
    table.add_column("pid", justify="right")
    table.add_column("MiB", justify="right")
    for part in PARTS:
        for name, address in _each(part, where.get(part) or ""):
            if name in memory:
                table.add_row(name, escape(address), str(stack[name].pid), f"{memory[name] / 2**20:,.0f}")
    table.add_section()
    table.add_row("", "", "", f"{sum(memory.values()) / 2**20:,.0f}")
    return table


def _each(part: str, address: str) -> list[tuple[str, str]]:
    """The processes of a part by name, with their addresses."""
    several = address.split(",") if part in ("primary", "secondary", "challenger") else []
    if len(several) < 2:
        return [(part, address)]
    return [(f"{part}-{number}", one) for number, one in enumerate(several, 1)]


def print_failure(console: Console, error: PartFailedError) -> None:
    """Shows what failed, how its log ends, and where the log is."""
    console.print(
        Panel(
            escape(error.log_tail) or "[dim]it wrote nothing[/]",
            title=f"[red]{escape(error.part)} {escape(error.reason)}[/]",
            title_align="left",
            border_style="red",
        )
    )
    console.print(f"its log is {escape(str(error.log_path))}", highlight=False, soft_wrap=True)
