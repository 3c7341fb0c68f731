"""The embedded stack: its parts, what each needs, and how they start and stop together.

Everything here blocks and belongs to no event loop, so that tests and commands can share one stack; asynchronous code
calls what takes time through `asyncio.to_thread`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import psutil
from pydantic import SecretStr

from local.stack.errors import DirectoryInUseError, PartFailedError, StackError, StartCancelledError
from local.stack.guard import Guard
from local.stack.parts import (
    alertmanager,
    bars,
    broker,
    console,
    market,
    postgres,
    prometheus,
    rules,
    server,
    torchserve,
    valkey,
    worker,
)
from local.stack.ports import LOOPBACK, default_port, free_ports, free_run, is_free
from local.stack.process import Process
from local.stack.settings import LocalSettings
from pretrade.client.file_lock import take_lock
from pretrade.client.operator_token import token_path
from pretrade.client.stack_file import LOCK_FILE, STACK_FILE, Endpoints, StackFile
from pretrade.console.cli import PORT as CONSOLE_PORT
from torchserve.config import TorchServeSettings, prepare, store_directory

_STEPS: Final[Mapping[str, tuple[str, ...]]] = {
    "models": (),
    "valkey": (),
    "broker": (),
    "postgres": (),
    "primary": ("models",),
    "secondary": ("models",),
    "challenger": ("models",),
    "worker": ("valkey", "broker"),
    "bars": ("postgres", "worker"),  # the worker makes the topic, as its settings say
    "market": ("worker",),
    "server": ("valkey", "postgres", "primary", "secondary", "challenger", "market"),
    "console": ("server",),
    "alertmanager": (),
    "prometheus": ("alertmanager", "server"),  # before it, every server would be down for a while
    "rules": ("prometheus",),
}
"""What is started, after what; the step `models` is done when the models are there."""

PARTS: Final = tuple(step for step in _STEPS if step != "models")
"""The parts that a stack can run."""

_REQUIRED: Final = (
    ("worker", "valkey"),
    ("worker", "broker"),
    ("server", "valkey"),
    ("market", "broker"),
    ("bars", "broker"),
    ("bars", "postgres"),
    ("prometheus", "alertmanager"),
    ("rules", "prometheus"),
    ("rules", "server"),
    ("console", "server"),
)
"""A part and another, ours or external, without which it is of no use."""

_MODELS: Final[Mapping[str, str]] = {"primary": "champion", "secondary": "champion", "challenger": "challenger"}
"""The roles that TorchServe processes have, and the model that each serves."""

_STOPPED_FIRST: Final = (("rules", "prometheus", "console"), ("market",), ("server", "worker", "bars"))
"""Parts that use others; all others are stopped after them."""

_TOKEN_MINUTES: Final = 365 * 24 * 60
"""A replica's tokens are renewed by restarting it; a server warns a week before they expire."""

_LOCK_SECONDS: Final = 10.0
"""How long the guard of a stack that was killed may still hold its directory."""
_LOOK_SECONDS: Final = 0.3
"""The same for a command that only looks whether a stack runs there."""

State = Literal["starting", "ready", "external", "failed", "stopping", "stopped"]


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of one step."""

    step: str
    state: State
    detail: str = ""
    """Where it is reached, or why it failed."""
    seconds: float = 0.0
    """What it took to get there."""


class Stack:
    """The parts of one directory, from `start` to `stop`; also a context manager of both.

    Args:
        settings: What to start, and where.
        parts: The parts to start, less those that the settings replace by external ones or switch off.
        report: Told of every step, from several threads.

    Raises:
        ValueError: There is no such part, or one lacks what it needs, or there is no recording in `settings.data`.
    """

    def __init__(
        self,
        settings: LocalSettings,
        *,
        parts: Collection[str] = PARTS,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        if unknown := set(parts) - set(PARTS):
            raise ValueError(f"no such part: {', '.join(sorted(unknown))}")
        self._external = _external_parts(settings)
        self._parts = set(parts) - self._external - _switched_off(settings)
        for part, required in _REQUIRED:
            if part in self._parts and required not in self._parts | self._external:
                raise ValueError(f"{part} needs {required}")
        _refuse_what_is_not_installed(self._parts)
        self._settings = settings
        self._replicas = {name: role for role in _MODELS for name in _names_of(role, settings)}
        """The TorchServe processes that there may be, and the role of each."""
        self._instruments = settings.instruments or market.instruments(settings.data)
        self._directory = settings.dir.resolve()
        self._report = report
        self._processes: dict[str, Process] = {}
        self._ports: Mapping[str, int] = {}
        self._endpoints: Endpoints | None = None
        self._cancelled = threading.Event()
        self._lock: int | None = None
        self._claims = ExitStack()
        self._guard: Guard | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __getitem__(self, part: str) -> Process:
        """The process of a part that this stack runs; KeyError when it does not."""
        return self._processes[part]

    @property
    def processes(self) -> Mapping[str, Process]:
        """The processes that this stack runs, by part."""
        return self._processes

    @property
    def endpoints(self) -> Endpoints:
        """Where the parts are reached.

        Raises:
            StackError: The stack has not been started.
        """
        if self._endpoints is None:
            raise StackError("the stack has not been started")
        return self._endpoints

    def start(self) -> None:
        """Starts the parts, each as soon as what it needs is ready, and blocks until all are; stops all if one fails.

        Raises:
            StackError: The directory cannot be written to.
            DirectoryInUseError: Another stack works in it.
            PartFailedError: The first part that failed.
        """
        try:
            self._take_directory()
            (self._directory / STACK_FILE).unlink(missing_ok=True)  # of a stack that was killed
            self._guard = Guard(grace_seconds=self._settings.guard_grace_seconds, held=self._lock)
            self._ports = _choose_ports(self._settings, self._replicas, self._claims)
            self._endpoints = self._choose_endpoints()
            self._start_parts()
            self._write_file()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stops the parts, first those that use others. Safe to call twice."""
        if self._lock is None:
            return
        (self._directory / STACK_FILE).unlink(missing_ok=True)
        before = {"models", *(part for parts in _STOPPED_FIRST for part in parts)}  # the training ends by itself
        for parts in (*_STOPPED_FIRST, tuple(part for part in self._processes if part not in before)):
            running = [part for part in parts if part in self._processes]
            if running:
                with ThreadPoolExecutor(max_workers=len(running), thread_name_prefix="stop") as pool:
                    list(pool.map(self._stop, running))
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        self._claims.close()
        os.close(self._lock)
        self._lock = None

    def restart(self, part: str) -> None:
        """Starts one part again on the same port, and blocks until it is ready. Raises what `Process.start` does."""
        began = time.monotonic()
        self._report(Progress(part, "starting"))
        self._processes[part].restart()
        self._write_file()
        self._report(Progress(part, "ready", seconds=time.monotonic() - began))

    def ended(self) -> list[str]:
        """The parts that were started and no longer run."""
        return [part for part, process in self._processes.items() if not process.alive]

    def memory_bytes(self) -> dict[str, int]:
        """Memory of each part, see `Process.memory_bytes`."""
        return {part: process.memory_bytes() for part, process in self._processes.items()}

    def _take_directory(self) -> None:
        """Locks the directory. The guard holds the lock too, until the last of our processes is gone."""
        path = self._directory / LOCK_FILE
        began = time.monotonic()
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)  # passwords, orders, and what became of them
            while (lock := take_lock(path)) is None:
                # A stack that lives keeps it; one that was killed lets go once its guard has ended its parts. A command
                # that looks for a stack holds it for an instant.
                holder = int(path.read_bytes() or b"0")
                patience = _LOOK_SECONDS if psutil.pid_exists(holder) else _LOCK_SECONDS
                if time.monotonic() - began > patience:
                    raise DirectoryInUseError(self._directory, holder)
                self._cancelled.wait(0.1)
        except OSError as error:
            raise StackError(
                f"cannot work in {self._directory}: {error.strerror}; "
                "name a directory that you may write to, with --dir or PRETRADE_LOCAL_DIR"
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        self._lock = lock

    def _choose_endpoints(self) -> Endpoints:
        settings, ports, parts = self._settings, self._ports, self._parts
        redis_url = _plain(settings.redis_url)
        if "valkey" in parts:
            directory = self._directory / "valkey"
            valkey.make_directory(directory)
            redis_url = valkey.url(ports["valkey"], directory)
        database_url = _plain(settings.database_url)
        if "postgres" in parts:
            directory = self._directory / "postgres"
            postgres.make_directory(directory)
            database_url = postgres.url(ports["postgres"], directory)
        kafka = broker.bootstrap_servers(ports["broker"]) if "broker" in parts else settings.kafka_bootstrap_servers
        serving = "server" in parts
        return Endpoints(
            redis_url=redis_url,
            kafka_bootstrap_servers=kafka,
            database_url=database_url,
            primary=self._addresses("primary") if "primary" in parts else settings.primary,
            secondary=self._addresses("secondary") if "secondary" in parts else settings.secondary,
            challenger=self._addresses("challenger") if "challenger" in parts else settings.challenger,
            decision=server.address(ports["decision"]) if serving else None,
            admin=server.address(ports["admin"]) if serving else None,
            metrics_url=f"http://{server.address(ports['metrics'])}" if serving else None,
            http_url=f"http://{server.address(ports['http'])}" if serving else None,
            worker_url=worker.url(ports["worker"]) if "worker" in parts else None,
            journal=str(self._directory / "server" / "journal.sqlite") if serving else None,
            operator_token_file=str(token_path(self._directory / "server" / "journal.sqlite")) if serving else None,
            model_store=str(self._model_store.resolve()),
            token_files={
                name: str(self._directory / name / torchserve.TOKEN_FILE)
                for name, role in self._replicas.items()
                if role in parts and self._settings.replica_tokens
            },
            management={role: self._addresses(role, "_management") for role in _MODELS if role in parts},
            instruments=self._instruments,
            prometheus_url=prometheus.url(ports["prometheus"]) if "prometheus" in parts else None,
            alertmanager_url=alertmanager.url(ports["alertmanager"]) if "alertmanager" in parts else None,
            console_url=console.url(ports["console"]) if "console" in parts else None,
            console_key_file=str(self._directory / "console" / "link.key") if "console" in parts else None,
        )

    def _addresses(self, role: str, service: str = "") -> str:
        """Where the processes of a role are reached, with commas between them."""
        names = (name for name, one in self._replicas.items() if one == role)
        return ",".join(torchserve.address(self._ports[f"{name}{service}"]) for name in names)

    def _start_parts(self) -> None:
        """Starts what there is to start, each step in a thread of its own."""
        for part in sorted(self._external):
            self._report(Progress(part, "external"))
        training = self._settings.model_store is None and not self._parts.isdisjoint(_MODELS)
        steps = self._parts | {"models"} if training else self._parts
        processes = len(_STEPS) + len(self._replicas)
        with ThreadPoolExecutor(max_workers=processes, thread_name_prefix="start") as pool:
            started: dict[str, Future[None]] = {}
            for step, needs in _STEPS.items():
                if step in steps:
                    needed = [started[name] for need in needs for name in self._names(need) if name in started]
                    for name in self._names(step):
                        started[name] = pool.submit(self._start_after, name, needed)
            try:
                for future in as_completed(started.values()):
                    future.result()
            except BaseException:
                self._cancelled.set()
                raise

    def _names(self, step: str) -> list[str]:
        """What a step starts: itself, or every TorchServe of that role."""
        return [name for name, role in self._replicas.items() if role == step] or [step]

    def _start_after(self, step: str, needed: Iterable[Future[None]]) -> None:
        """Starts one step once those it needs are ready, and reports how that went."""
        for future in needed:
            future.result()
        if self._cancelled.is_set():
            raise StartCancelledError(step)
        began = time.monotonic()
        self._report(Progress(step, "starting"))
        try:
            where = self._start(step)
        except StartCancelledError:
            raise
        except Exception as error:
            failure = error if isinstance(error, PartFailedError) else self._not_launched(step, error)
            self._report(Progress(step, "failed", failure.reason, time.monotonic() - began))
            raise failure from error
        self._report(Progress(step, "ready", where, time.monotonic() - began))

    def _not_launched(self, step: str, error: Exception) -> PartFailedError:
        return PartFailedError(step, f"cannot be launched: {error}", self._log_path(step), "")

    def _start(self, step: str) -> str:
        """Starts one step and blocks until it is ready; returns where it is reached, for people."""
        starts: Mapping[str, Callable[[], str]] = {
            "models": self._start_models,
            "valkey": self._start_valkey,
            "broker": self._start_broker,
            "postgres": self._start_postgres,
            **{name: partial(self._start_replica, name) for name in self._replicas},
            "worker": self._start_worker,
            "bars": self._start_bars,
            "server": self._start_server,
            "market": self._start_market,
            "console": self._start_console,
            "alertmanager": self._start_alertmanager,
            "prometheus": self._start_prometheus,
            "rules": self._start_rules,
        }
        return starts[step]()

    def _start_models(self) -> str:
        argv = torchserve.training_argv(self._model_store, self._settings.data)
        timeout = self._settings.training_timeout_seconds
        self._process("models", argv, start_timeout_seconds=timeout).run(
            self._cancelled, told=lambda line: self._report(Progress("models", "starting", line))
        )
        return str(self._model_store)

    def _start_valkey(self) -> str:
        port = self._ports["valkey"]
        directory = self._directory / "valkey"
        argv = valkey.argv(port, directory)
        self._run(self._process("valkey", argv, ready=partial(valkey.ready, port, directory)))
        return valkey.address(port)

    def _start_broker(self) -> str:
        port = self._ports["broker"]
        self._run(self._process("broker", broker.argv(port), ready=partial(broker.ready, port)))
        return broker.bootstrap_servers(port)

    def _start_postgres(self) -> str:
        assert self._guard
        directory, port, user = self._directory / "postgres", self._ports["postgres"], postgres.user()
        programs = postgres.programs(self._guard)
        if not postgres.initialized(directory):
            self._process("postgres", postgres.initdb_argv(directory, programs), user=user).run(self._cancelled)
            postgres.finish_initdb(directory)
        self._run(
            self._process(
                "postgres",
                postgres.argv(port, directory, programs),
                ready=partial(postgres.ready, port, directory),
                user=user,
                stop_signal=signal.SIGINT,  # its fast shutdown; SIGTERM would wait for its clients
            )
        )
        return postgres.address(port)

    def _start_replica(self, name: str) -> str:
        port, model = self._ports[name], _MODELS[self._replicas[name]]
        launch = prepare(
            TorchServeSettings(
                archive=torchserve.archive(self._model_store, model),
                model_name=model,
                directory=self._directory / name,
                grpc_port=port,
                management_port=self._ports[f"{name}_management"],
                gpus=self._settings.gpus,
                token_minutes=_TOKEN_MINUTES if self._settings.replica_tokens else None,
            )
        )
        token_file = Path(path) if (path := self.endpoints.token_files.get(name)) else None
        ready = partial(torchserve.ready, port, model, token_file)
        self._run(self._process(name, launch.argv, env=launch.env, ready=ready))
        return torchserve.address(port)

    def _start_worker(self) -> str:
        port = self._ports["worker"]
        env = worker.env(self.endpoints, port, self._bars_url)
        self._run(self._process("worker", worker.argv(), env=env, ready=partial(worker.ready, port)))
        return worker.url(port)

    @property
    def _bars_url(self) -> str | None:
        return bars.database_url(self.endpoints) if "bars" in self._parts else None

    def _start_bars(self) -> str:
        port = self._ports["bars"]
        env = bars.env(self.endpoints, port)
        self._run(self._process("bars", bars.argv(), env=env, ready=partial(worker.ready, port)))
        return worker.url(port)

    def _start_server(self) -> str:
        env = server.env(self.endpoints, self._ports, self._bars_url)
        ready = partial(server.ready, self._ports["decision"])
        self._run(self._process("server", server.argv(self._settings.processes), env=env, ready=ready))
        return server.address(self._ports["decision"])

    def _start_market(self) -> str:
        data, speed = self._settings.data, self._settings.speed
        argv = market.argv(self.endpoints, data, speed, self._settings.scenario)
        self._run(self._process("market", argv, ready=partial(market.ready, self.endpoints)))
        return "simulated" if data is None else f"{data} at speed {speed}"

    def _start_console(self) -> str:
        port, key = self._ports["console"], self.endpoints.console_key_file
        assert key is not None
        console.write_key(Path(key))
        argv, env = console.argv(self.endpoints, port), console.env(self.endpoints)
        self._run(self._process("console", argv, env=env, ready=partial(console.ready, port)))
        return console.url(port)

    def _start_alertmanager(self) -> str:
        port, configuration = self._ports["alertmanager"], self._settings.alertmanager_config
        argv = alertmanager.argv(port, self._directory / "alertmanager", configuration and configuration.resolve())
        self._run(self._process("alertmanager", argv, ready=partial(prometheus.ready, alertmanager.url(port))))
        return alertmanager.url(port)

    def _start_prometheus(self) -> str:
        port, directory = self._ports["prometheus"], self._directory / "prometheus"
        kept = worker.url(self._ports["bars"]) if "bars" in self._parts else None
        prometheus.write_configuration(directory, self.endpoints, self._settings.processes, kept)
        argv = prometheus.argv(port, directory)
        self._run(self._process("prometheus", argv, ready=partial(prometheus.ready, prometheus.url(port))))
        return prometheus.url(port)

    def _start_rules(self) -> str:
        path = prometheus.user_rules(self._directory / "prometheus")
        path.unlink(missing_ok=True)  # of an earlier stack
        argv, env = rules.argv(self.endpoints, path), rules.env(self.endpoints)
        self._run(self._process("rules", argv, env=env, ready=partial(rules.ready, path)))
        return str(path)

    @property
    def _model_store(self) -> Path:
        return self._settings.model_store or store_directory(self._directory, self._settings.data)

    def _process(
        self,
        part: str,
        argv: Sequence[str],
        *,
        ready: Callable[[], None] | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        start_timeout_seconds: float | None = None,
    ) -> Process:
        assert self._guard
        return Process(
            part,
            argv,
            directory=self._directory / part,
            log_path=self._log_path(part),
            guard=self._guard,
            ready=ready,
            env=env,
            user=user,
            stop_signal=stop_signal,
            start_timeout_seconds=start_timeout_seconds or self._settings.start_timeout_seconds,
            stop_timeout_seconds=self._settings.stop_timeout_seconds,
        )

    def _log_path(self, part: str) -> Path:
        return self._directory / "logs" / f"{part}.log"

    def _run(self, process: Process) -> None:
        self._processes[process.name] = process
        process.start(self._cancelled)

    def _write_file(self) -> None:
        pids = {part: process.pid for part, process in self._processes.items() if process.pid is not None}
        StackFile(pid=os.getpid(), endpoints=self.endpoints, processes=pids).write(self._directory)

    def _stop(self, part: str) -> None:
        began = time.monotonic()
        self._report(Progress(part, "stopping"))
        self._processes[part].stop()
        self._report(Progress(part, "stopped", seconds=time.monotonic() - began))


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


def _external_parts(settings: LocalSettings) -> set[str]:
    """The parts that the settings replace."""
    given = {
        "valkey": settings.redis_url,
        "broker": settings.kafka_bootstrap_servers,
        "postgres": settings.database_url,
        "primary": settings.primary,
        "secondary": settings.secondary,
        "challenger": settings.challenger,
    }
    return {part for part, address in given.items() if address is not None}


def _switched_off(settings: LocalSettings) -> set[str]:
    """The parts that the settings do not want."""
    wanted = {"market": settings.market, "bars": settings.bars, "console": settings.console}
    wanted |= dict.fromkeys(("prometheus", "alertmanager", "rules"), settings.alerts)
    return {part for part, is_wanted in wanted.items() if not is_wanted}


def _refuse_what_is_not_installed(parts: Collection[str]) -> None:
    """Refuses parts whose programs do not come with our packages.

    Raises:
        ValueError: One is not installed.
    """
    for part, found in (("prometheus", prometheus.program), ("alertmanager", alertmanager.program)):
        if part in parts and found() is None:
            raise ValueError(
                f"--alerts needs {part}, which is not installed: Debian's packages are prometheus and"
                " prometheus-alertmanager; others are on prometheus.io/download, to be put on the PATH"
            )
    if "prometheus" in parts and not prometheus.OBSERVABILITY.is_dir():
        raise ValueError(f"--alerts needs the rules in {prometheus.OBSERVABILITY}: run it in a clone of the repository")


def _names_of(role: str, settings: LocalSettings) -> list[str]:
    """The TorchServes of a role, by the names that the decision server has for them."""
    if role != "primary" or settings.replicas == 1:
        return [role]
    return [f"{role}-{number}" for number in range(1, settings.replicas + 1)]


def _choose_ports(settings: LocalSettings, replicas: Collection[str], claims: ExitStack) -> dict[str, int]:
    """A port for everything that listens: the user's, the server's default where it is free, or any free one.

    Raises:
        StackError: Something else listens on a port of the user's.
    """
    for setting in ("decision_port", "admin_port", "metrics_port", "http_port", "console_port"):
        port = getattr(settings, setting)
        if port and not is_free(port):
            raise StackError(
                f"PRETRADE_LOCAL_{setting.upper()}: something else listens on {LOOPBACK}:{port}; name another port,"
                " or 0 for one that is free"
            )
    # Each of several processes has the next port for its metrics, and so has the one that replaces another.
    several = 0 if settings.processes is None else settings.processes + 1
    for port in range(settings.metrics_port, settings.metrics_port + several) if settings.metrics_port else ():
        if not is_free(port):
            raise StackError(
                f"PRETRADE_LOCAL_METRICS_PORT: {settings.processes} processes need {several} ports in a row, and"
                f" something else listens on {LOOPBACK}:{port}; name another port, or 0 for any that are free"
            )
    metrics = settings.metrics_port or (free_run(several) if several else default_port(7003, claims))
    wanted = {
        "decision": settings.decision_port or default_port(7001, claims),
        "admin": settings.admin_port or default_port(7002, claims),
        "metrics": metrics,
        # 7004 may be that of a process's metrics
        "http": settings.http_port or (None if several else default_port(7004, claims)),
        "console": settings.console_port or default_port(CONSOLE_PORT, claims),
    }
    management = (f"{name}_management" for name in replicas)
    others = ("worker", "bars", "prometheus", "alertmanager")
    ours = ("valkey", "broker", "postgres", *replicas, *management, *others, *wanted)
    return {name: wanted.get(name) or free for name, free in zip(ours, free_ports(len(ours)), strict=True)}
