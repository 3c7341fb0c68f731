"""One replica of a model server: its channel, breaker, batcher, latency and health."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ConfigDict, Field

from feature_cache.constants import Constant
from feature_cache.ending import end
from feature_cache.feature_set import FeatureSet
from server.inference import model_sets
from server.inference.batcher import BatcherSettings, MicroBatcher
from server.inference.breaker import Breaker, BreakerSettings, State
from server.inference.codec import TORCHSERVE, Codec
from server.inference.flight import Report
from server.inference.http2_client import Http2Client
from server.inference.http2_connection import MOST_ANSWER_BYTES, UnusableError
from server.inference.outcome import BLAMES_CONTENT, BatchFailedError, Outcome, classify
from server.inference.rows import Lane
from server.inference.token import ReplicaToken
from server.inference.wire import ModelIdentity, ScoreBatch
from server.security.client_tls import ClientTls
from server.timing.latency import LatencyWindow

_log = structlog.get_logger(__name__)

_CHANNEL_OPTIONS = (
    # gRPC's own retries would multiply with ours.
    ("grpc.enable_retries", 0),
    # The default backoff (1 s to 120 s) keeps a restarted replica out for seconds; this one about 0.15 s.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 300),
    # A connection that swallows everything stays READY for ever without these. TorchServe tolerates pings during calls;
    # without calls, or with max_pings_without_data raised, it answers GOAWAY too_many_pings.
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 500),
    ("grpc.keepalive_permit_without_calls", 0),
    # A replica that moved is looked up again at once, not up to 30 s later; what is known stays when nothing is found.
    ("grpc.dns_min_time_between_resolutions_ms", 500),
    # The keepalive's timeout does not bound a ping that is under way for another reason (gRPC measures bandwidth with
    # them), and no second one is sent meanwhile: without this a black hole holds the connection for a minute.
    ("grpc.http2.ping_timeout_ms", 500),
    # Two replicas at one address must not share a connection.
    ("grpc.use_local_subchannel_pool", 1),
    # A proxy of the environment is for callers of the outside world: it has no place in a budget of milliseconds.
    ("grpc.enable_http_proxy", 0),
    # Bounds what a broken answer can cost.
    ("grpc.max_receive_message_length", MOST_ANSWER_BYTES),
)
_LOOKED_UP = "://"
"""In an endpoint that gRPC's client is to look up."""
_HANDSHAKE_SECONDS = 1.0
"""What a connection with new certificates may take before it counts as refused."""
_AGAIN_SECONDS = 5.0
"""Between two attempts with certificates that were refused: probes wait meanwhile."""
_MIN_PROBE_GAP_SECONDS = 0.02
"""Between probes in half-open."""
_CLOCK_RESOLUTION_SECONDS = 0.001
"""A probe that is due sooner than this is due."""
_WARM_UP_ROUND = 40
"""Calls of a warm-up whose median is compared with that of earlier rounds."""
_WARM_UP_GAIN = 0.95
"""A round that is quicker than this part of the best one so far shows that the replica still warms up."""
_WARM_UP_STALE_ROUNDS = 2
"""A warm-up ends after so many rounds in a row without a gain: one alone may have met a busy machine."""


class ReplicaSettings(BaseModel):
    """Health probes of the replicas."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    call_bound_seconds: Constant[float] = 5.0
    """A call that was given up is ended after this, in seconds: cancelling early would restart TorchServe's worker."""
    probe_interval_seconds: Constant[float] = 1.0
    """Time between health probes, in seconds. A replica that died is known to be dead within a second, and a probe
    costs it a row."""
    suspicion_interval_seconds: Constant[float] = 0.1
    """The same while the last batch failed or was slow, in seconds: orders that pass a slow replica over tell nothing
    about it any more."""
    probe_timeout_seconds: float = Field(default=0.2, gt=0, le=10)
    """A health probe without a valid answer after this time has failed, in seconds. Raise it for a replica that is far
    away."""
    warm_up_seconds: float = Field(default=4.0, ge=0, le=60)
    """Before a server says that it is ready, it sends each replica rows that no caller asked for, until the replica
    answers no quicker or this time is over, in seconds: a TorchServe that has just started takes three times as long at
    first. 0: not at all. Set it to 0 if your model servers charge by the call."""


@dataclass(frozen=True, slots=True)
class ReplicaLimits:
    """The settings of a replica's parts."""

    probes: ReplicaSettings = field(default_factory=ReplicaSettings)
    batcher: BatcherSettings = field(default_factory=BatcherSettings)
    breaker: BreakerSettings = field(default_factory=BreakerSettings)


class Network(NamedTuple):
    """How endpoints are reached."""

    open_channel: Callable[..., grpc.aio.Channel] = grpc.aio.insecure_channel
    """Makes gRPC's channel to one."""
    dials: bool = False
    """Whether it is asked over a connection of the event loop's besides, which costs less."""


BY_GRPC_ALONE: Final = Network()


class Replica:
    """Scores rows on one model of one server, and knows how it is doing.

    `async with` opens the channel and starts probing; leaving it ends both. Used from one event loop.

    Args:
        name: Its role, `primary`, `secondary` or `challenger`; followed by a number where several serve it.
        endpoint: `host:port` of the server's gRPC inference service.
        model_name: The registered model.
        wanted_version: The only model version that is asked and whose scores are used; None takes what the replica
            serves.
        limits: Of its probes, batches and breaker.
        clock: Monotonic seconds, the event loop's own.
        random: Uniform in [0, 1).
        stalled_seconds: How long the event loop stood still since an instant; no fault of the replica.
        under_way: Orders that the server is deciding now; rows of theirs are waited for.
        codec: The server's protocol.
        token: What it wants to be shown; None for nothing.
        tls: Opens connections, where these are to be TLS.
        warm_up_turn: Held while it is warmed up: replicas that share a machine would make each other look slow.
        network: How its endpoint is reached.
    """

    several: Final = False
    """True for a role that several endpoints serve."""

    def __init__(
        self,
        name: str,
        endpoint: str,
        model_name: str,
        wanted_version: str | None,
        limits: ReplicaLimits,
        *,
        clock: Callable[[], float],
        random: Callable[[], float],
        stalled_seconds: Callable[[float], float] = lambda since: 0.0,
        under_way: Callable[[], int] = lambda: 0,
        codec: Codec = TORCHSERVE,
        token: ReplicaToken | None = None,
        network: Network = BY_GRPC_ALONE,
        tls: ClientTls | None = None,
        warm_up_turn: asyncio.Lock | None = None,
    ) -> None:
        self.name = name
        self.endpoint = endpoint
        self.tls = tls
        self.token = token
        self.model_name = model_name
        self.wanted_version = wanted_version
        """May change at any time; a batch under way keeps the version that it was sent for."""
        self._batch_listeners: list[Callable[[Outcome, float], None]] = []
        self._settings = limits.probes
        self._clock = clock
        self.codec: Final = codec
        self._open_channel = network.open_channel if tls is None else tls.channel
        self._direct: Http2Client | None = None
        if network.dials and tls is None and codec.method is not None and _LOOKED_UP not in endpoint:
            self._direct = Http2Client(name, endpoint, codec.method.path, clock, random)
        self._grpc_calls = 0
        self._retired: set[asyncio.Task[None]] = set()
        self._asked: set[asyncio.Task[ScoreBatch]] = set()
        """Calls of the prober that are under way, those that it no longer waits for among them."""
        """Channels that nothing new is sent on; what is under way ends there."""
        self.latency = LatencyWindow(clock, prior_seconds=0.002)
        self.breaker = Breaker(name, limits.breaker, clock, random, self._on_transition)
        self.batcher = MicroBatcher(
            self._score, self._begin, self.latency, limits.batcher, clock, stalled_seconds, under_way
        )
        self._stalled_seconds = stalled_seconds
        self.model: ModelIdentity | None = None
        """The model of the last sound answer; None before the first."""
        self.healthy = False
        """True while the last probe got a sound answer."""
        self.drained = False
        """True while on-call sends it no orders."""
        self.ejected = ""
        """Why it gets no orders although nobody drained it and its breaker is closed; empty when it may get some."""
        self.proven = asyncio.Event()
        """Set by the first sound answer."""
        self.tried = asyncio.Event()
        """Set when it has given a sound answer and is warm."""
        self.outcomes: Counter[Outcome] = Counter()
        """Batches and probes by outcome since start."""
        self.transitions: Counter[State] = Counter()
        """Breaker transitions by the state entered."""
        self.warm = not limits.probes.warm_up_seconds
        """False until the replica has been warmed up, once, after its first sound answer."""
        self._warm_up_turn = warm_up_turn or asyncio.Lock()
        self._recheck = asyncio.Event()
        self._probed = False
        self._connected_with = 0 if tls is None else tls.files.version
        """Version of the certificates that the connection was made with."""
        self._connect_at = -float("inf")
        """When certificates that were refused are tried again."""

    def on_batch(self, listener: Callable[[Outcome, float], None]) -> None:
        """Registers a function that is called with how each batch ended and what it took, in seconds.

        NaN for a batch of shadow rows: it is large, and no caller waits for it, so what it takes says nothing of what
        an order would. It is not called for probes, nor for a batch that may have failed because of a row with a
        caller's own features.
        """
        self._batch_listeners.append(listener)

    def on_join(self, listener: Callable[[Replica], None]) -> None:
        """See `Pool.on_join`: no endpoint ever joins it."""

    async def __aenter__(self) -> Replica:
        self._channel = self._open_channel(self.endpoint, options=_CHANNEL_OPTIONS)
        self._call = self.codec.open(self._channel)
        if self._direct is not None:
            self._direct.open()
        self._prober = asyncio.create_task(self._probe_forever(), name=f"probe-{self.name}")
        return self

    async def __aexit__(self, *_: object) -> None:
        await end([self._prober])
        with contextlib.suppress(asyncio.CancelledError):
            self._prober.result()
        await self.batcher.close()
        for left in (*self._retired, *self._asked):
            left.cancel()
        await asyncio.gather(*self._retired, *self._asked, return_exceptions=True)
        if self._direct is not None:
            await self._direct.close()
        await self._channel.close(grace=None)

    @property
    def feature_set(self) -> FeatureSet:
        """The set of the rows that its model takes, as far as that is known."""
        return self.codec.feature_set_of(self._version) or model_sets.of(self._version)

    @property
    def _version(self) -> str:
        """The version that is asked; what stands for it while the choice is the server's and it has not answered."""
        return self.wanted_version or (self.name if self.model is None else self.model.version)

    @property
    def calls_by_client(self) -> dict[str, int]:
        """Calls by the client that made them, `direct` or `grpc`."""
        return {"direct": 0 if self._direct is None else self._direct.calls, "grpc": self._grpc_calls}

    @property
    def available(self) -> bool:
        """True when it is not drained or ejected and the breaker lets a live row pass."""
        return not self.drained and not self.ejected and self.breaker.passes

    @property
    def names(self) -> tuple[str]:
        """Of the endpoints that it may have."""
        return (self.name,)

    @property
    def candidates(self) -> tuple[Replica, ...]:
        """Endpoints that are still to join it: none ever."""
        return ()

    @property
    def replicas(self) -> tuple[Replica]:
        """Itself: a role that one endpoint serves is that replica."""
        return (self,)

    def pick(self, tried: Collection[str] = ()) -> Replica | None:
        """Itself, if it is available and was not tried: see `Pool.pick`."""
        return self if self.available and self.name not in tried else None

    def would_wait(self, rows: int) -> bool:
        """See `MicroBatcher.would_wait`; False where it is not available."""
        return self.available and self.batcher.would_wait(rows)

    @property
    def wait_seconds(self) -> float:
        """What a row that comes now may have to wait for its score, to compare replicas by; infinite when it is full.

        More wary than `MicroBatcher.expected_seconds`, which an order asks that has no other replica: here the newest
        batch counts where it was slow, and a batch that takes longer than usual has not come back yet.
        """
        batcher, latency = self.batcher, self.latency
        if batcher.full:
            return math.inf
        late = max(0.0, batcher.under_way_seconds - latency.p95)
        return max(latency.p50, latency.newest) * batcher.expected_batches(Lane.LIVE) + late

    async def ask(self, rows: list[bytes], version: str | None, traceparent: str = "") -> ScoreBatch:
        """One call of its own, past the batcher and unknown to the breaker.

        Args:
            rows: Encoded rows, all of one feature set.
            version: The version that is to answer; None for the server's choice.
            traceparent: The trace that the call belongs to; empty for none.

        Raises:
            BatchFailedError: No usable answer, by class.
        """
        feature_set = model_sets.set_of(rows)
        if feature_set is None:  # another version has just taken over; they may try elsewhere
            raise BatchFailedError(Outcome.OVERLOAD, "rows of several feature sets")
        asked = self._clock()
        try:
            answer = await self._answer(
                self.codec.request(self.model_name, rows, version or "", feature_set), self._metadata(traceparent)
            )
        except grpc.aio.AioRpcError as error:
            model_sets.learn_from_refusal(version or self._version, error.details() or "")
            is_over = self._clock() - asked >= self._settings.call_bound_seconds
            outcome = classify(error.code(), error.details() or "", is_over=is_over)
            raise BatchFailedError(outcome, error.details() or "") from error
        batch = self.codec.parse(self.model_name, len(rows), answer)
        if version is not None and batch.model.version != version:
            raise BatchFailedError(Outcome.BAD_ANSWER, f"model version {batch.model.version}, expected {version}")
        model_sets.learn(batch.model.version, batch.model.feature_set)
        if batch.model.feature_set is not feature_set:
            detail = f"feature set {batch.model.feature_set.version}, expected {feature_set.version}"
            raise BatchFailedError(Outcome.BAD_ANSWER, detail)
        return batch

    async def _score(self, rows: list[bytes], traceparent: str = "") -> ScoreBatch:
        """One call for the batcher or the prober; raises `BatchFailedError`."""
        batch = await self.ask(rows, self.wanted_version, traceparent)
        if self.model != batch.model:
            _log.info("model", replica=self.name, version=batch.model.version, threshold=batch.model.threshold)
            self.model = batch.model
        return batch

    async def _answer(self, request: Any, metadata: tuple[tuple[str, str], ...]) -> Any:
        """The answer to a request, directly where that can be; raises as gRPC's client does, and `BatchFailedError`."""
        direct, method, seconds = self._direct, self.codec.method, self._settings.call_bound_seconds
        if direct is not None and method is not None:
            try:
                message = await direct.call(request.SerializeToString(), seconds, metadata)
            except UnusableError:
                pass
            else:
                try:
                    return method.read(message)
                except DecodeError as error:
                    raise BatchFailedError(Outcome.BAD_ANSWER, f"no message of the protocol: {error}") from error
        self._grpc_calls += 1
        return await self._call(request, timeout=seconds, metadata=metadata or None)

    def _metadata(self, traceparent: str) -> tuple[tuple[str, str], ...]:
        """What a call carries besides its rows: TorchServe's token, and the trace it belongs to."""
        metadata = () if self.token is None else self.token.inference
        if traceparent:
            metadata = (*metadata, ("traceparent", traceparent))
        return metadata

    def _begin(self, from_caller: bool, shadow: bool) -> Report:
        """Starts the account of one batch: its outcome counts for the breaker generation it left in.

        A failure that a row with a caller's own features may have caused is not reported to what compares models.
        Nobody finds a batch of shadow rows slow: see `on_batch`.
        """
        generation = self.breaker.generation

        def report(outcome: Outcome, seconds: float) -> None:
            self.outcomes[outcome] += 1
            self.breaker.record(outcome, 0.0 if shadow else seconds, generation)
            if not (from_caller and outcome in BLAMES_CONTENT):
                for listener in self._batch_listeners:
                    listener(outcome, math.nan if shadow else seconds)
            if self.breaker.suspicious:
                self._recheck.set()

        return report

    async def _connect_anew(self, version: int) -> None:
        """Puts a connection with the certificates of now in place of the one there is.

        It is tried first: while the server does not take it, the old one goes on for as long as it works.
        """
        channel = self._open_channel(self.endpoint, options=_CHANNEL_OPTIONS)
        try:
            async with asyncio.timeout(_HANDSHAKE_SECONDS):
                await channel.channel_ready()
        except TimeoutError:
            if self._channel.get_state() is grpc.ChannelConnectivity.READY:
                _log.warning(
                    "new certificates: the replica does not answer with them, the old ones stay in use",
                    replica=self.name,
                )
                await channel.close(grace=None)
                self._connect_at = self._clock() + _AGAIN_SECONDS
                return
        old, self._channel, self._call = self._channel, channel, self.codec.open(channel)
        self._connected_with = version
        _log.info("new certificates are in use", replica=self.name)
        closing = asyncio.create_task(old.close(grace=self._settings.call_bound_seconds))
        self._retired.add(closing)
        closing.add_done_callback(self._retired.discard)

    async def _probe_forever(self) -> None:
        """Probes with a canned row: regularly while closed, and as the breaker permits while it is not."""
        while True:
            if self.token is not None:
                await self.token.refresh()
            if self.tls is not None:
                await asyncio.to_thread(self.tls.look)
                if self.tls.files.version != self._connected_with and self._clock() >= self._connect_at:
                    await self._connect_anew(self.tls.files.version)
            await self._probe()
            if self.healthy and not self.warm:
                async with self._warm_up_turn:
                    await self._warm_up()
            if self.healthy:
                self.tried.set()
            probed_at = self._clock()
            while (wait := self._next_probe(probed_at) - self._clock()) > _CLOCK_RESOLUTION_SECONDS:
                self._recheck.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):  # `wait_for` of Python 3.11 can lose a cancellation
                        await self._recheck.wait()

    async def _warm_up(self) -> None:
        """Calls the replica until it answers no quicker, or fails, or the time for that is over."""
        calls, best, stale = 0, float("inf"), 0
        until = self._clock() + self._settings.warm_up_seconds
        with contextlib.suppress(BatchFailedError, TimeoutError):
            while stale < _WARM_UP_STALE_ROUNDS:
                times = []
                for _ in range(_WARM_UP_ROUND):
                    started = self._clock()
                    await self._canned_score(until - started)
                    times.append(self._clock() - started - self._stalled_seconds(started))
                    self.latency.add(times[-1])
                    calls += 1
                median = sorted(times)[_WARM_UP_ROUND // 2]
                stale = 0 if median < _WARM_UP_GAIN * best else stale + 1
                best = min(best, median)
        self.warm = True
        _log.info("replica is warm", replica=self.name, calls=calls, seconds=self.latency.p50)

    async def _canned_score(self, seconds: float) -> ScoreBatch:
        """The answer to a canned row, if it comes within so many seconds.

        A call that takes longer is left to end by itself, as the batcher leaves its own: TorchServe restarts its worker
        if a call is cancelled just when its answer is sent.

        Raises:
            BatchFailedError: No usable answer.
            TimeoutError: No answer in time.
        """
        if seconds <= 0:
            raise TimeoutError
        call = asyncio.create_task(self._score([self._canned_row()]), name=f"canned-{self.name}")
        self._asked.add(call)
        call.add_done_callback(self._ended)
        await asyncio.wait([call], timeout=seconds)
        if not call.done():
            raise TimeoutError
        return call.result()

    def _canned_row(self) -> bytes:
        feature_set = self.feature_set
        return model_sets.row_of(feature_set, bytes(feature_set.row_bytes))

    def _ended(self, call: asyncio.Task[ScoreBatch]) -> None:
        self._asked.discard(call)
        if not call.cancelled():
            call.exception()  # nobody else may ask for it

    def _next_probe(self, probed_at: float) -> float:
        """The instant of the next probe, as things stand."""
        settings, breaker = self._settings, self.breaker
        interval = settings.suspicion_interval_seconds if breaker.suspicious else settings.probe_interval_seconds
        due = min(probed_at + interval, self._clock() + breaker.seconds_to_half_open)
        return max(due, probed_at + _MIN_PROBE_GAP_SECONDS)

    async def _probe(self) -> None:
        breaker = self.breaker
        closed = breaker.state is State.CLOSED
        generation = breaker.generation if closed else breaker.try_probe()
        if generation is None:
            return
        started = self._clock()
        outcome = Outcome.IGNORED
        detail = ""
        try:
            batch = await self._canned_score(self._settings.probe_timeout_seconds)
            score = float(batch.scores[0])
            outcome = Outcome.SUCCESS if 0.0 <= score <= 1.0 else Outcome.BAD_ANSWER
        except BatchFailedError as failure:
            outcome, detail = failure.outcome, str(failure)
        except TimeoutError:
            outcome, detail = Outcome.TIMEOUT, f"no answer within {self._settings.probe_timeout_seconds} s"
        except Exception as error:
            # A fault of ours. Without probes the breaker would stay open for ever.
            _log.exception("probe failed unexpectedly", replica=self.name)
            outcome, detail = Outcome.MODEL_ERROR, repr(error)
        finally:
            stalled = self._stalled_seconds(started)
            if outcome is Outcome.TIMEOUT and stalled:
                outcome, detail = Outcome.IGNORED, f"{detail}, of which our event loop stood still for {stalled:.3f} s"
            seconds = self._clock() - started - stalled
            (breaker.record if closed else breaker.record_probe)(outcome, seconds, generation)
            self.outcomes[outcome] += 1
        if outcome is Outcome.SUCCESS:
            self.latency.add(seconds)
        if outcome is Outcome.IGNORED:
            return
        healthy = outcome is Outcome.SUCCESS
        if healthy != self.healthy or not self._probed:
            log = _log.info if healthy else _log.warning
            log("replica health", replica=self.name, healthy=healthy, outcome=outcome.value, detail=detail)
        self.healthy, self._probed = healthy, True
        if healthy:
            self.proven.set()

    def _on_transition(self, previous: State, state: State) -> None:
        self.transitions[state] += 1
        if state is State.CLOSED:
            # What made it open says nothing about the replica that the probes found sound.
            self.latency.clear()
        log = _log.warning if state is State.OPEN else _log.info
        log("breaker", replica=self.name, previous=previous.value, state=state.value)
        self._recheck.set()
