"""Commands that publish to the market data topic: `replay` a recording, `simulate` a market."""

from __future__ import annotations

import enum
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from feature_cache.sources.simulated.scenarios import ScenarioName

if TYPE_CHECKING:
    from feature_cache.sources import session
    from pretrade.market.v1 import market_pb2 as pb

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


class ExchangeName(enum.StrEnum):
    """Exchanges on the command line."""

    BINANCE = "binance"
    BINANCE_USDM = "binance-usdm"
    BINANCE_COINM = "binance-coinm"
    KRAKEN = "kraken"
    COINBASE = "coinbase"


class FormatName(enum.StrEnum):
    """How recordings are written, on the command line."""

    RAW = "raw"
    RECORDER = "recorder"
    TARDIS = "tardis"
    LOBSTER = "lobster"


Kafka = Annotated[str, typer.Option(help="Comma-separated host:port of the Kafka brokers.")]
Topic = Annotated[str, typer.Option(help="Topic to publish to; created when missing.")]
Speed = Annotated[str, typer.Option(help="How many times faster than it happened, or max.")]

Linger = Annotated[
    float,
    typer.Option("--linger-ms", min=0, max=1000, help="How long an event waits for others to share its batch."),
]

_LINGER_MS = 20.0
KAFKA = "127.0.0.1:9092"
TOPIC = "market.events"


@app.command()
def replay(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Recordings, plain or gzip, or folders with them below. The times in them decide."),
    ],
    venue: Annotated[
        ExchangeName | None,
        typer.Option(help="Whose raw lines, `<receive ns> <message>`, these are. Default: what the messages say."),
    ] = None,
    file_format: Annotated[
        FormatName | None,
        typer.Option("--format", help="How the files are written. Default: what they say themselves."),
    ] = None,
    speed: Speed = "1",
    kafka: Kafka = KAFKA,
    topic: Topic = TOPIC,
    linger_ms: Linger = _LINGER_MS,
    loop: Annotated[bool, typer.Option("--loop", help="Start again at the end, until interrupted.")] = False,
    instruments: Annotated[
        list[str] | None, typer.Option(help="Publish only these, for example BTCUSDT.BINANCE.")
    ] = None,
) -> None:
    """Publish recorded market data to Kafka with its original timing.

    A recording is what `pretrade ingest --record` wrote, raw lines of an exchange, CSV files of Tardis.dev (trades and
    incremental_book_L2), or pairs of message and orderbook files of LOBSTER.

    Examples: `pretrade replay btcusdt_*.gz --venue binance-usdm --speed 10`,
    `pretrade replay AAPL_2012-06-21_*.csv --format lobster --speed max`
    """
    # The clients of the brokers and the decoders, which the other commands of `pretrade` do not need.
    from feature_cache.sources import publication, session  # noqa: PLC0415
    from feature_cache.sources.publisher import EventPublisher, with_resets, with_snapshots  # noqa: PLC0415

    factor = _factor(speed)
    told = _told(venue, file_format)
    try:
        files = session.session_files(paths)
        recorded = session.instruments(files, told)
    except session.SessionError as error:
        raise typer.BadParameter(str(error)) from error
    chosen = set(instruments or recorded)
    if missing := chosen.difference(recorded):
        raise typer.BadParameter(f"no recording of {', '.join(sorted(missing))}; there is {', '.join(recorded)}")
    progress = session.Progress(files)

    def rounds() -> Iterator[Iterable[pb.MarketEvent]]:
        for _ in itertools.count() if loop else range(1):
            yield with_snapshots(with_resets(session.read_session(files, chosen, told, progress), "replay"))

    publisher = EventPublisher(kafka, topic, linger_seconds=linger_ms / 1000)
    raise typer.Exit(publication.run(rounds(), factor, publisher, "replayed", lambda: progress.share))


@app.command("simulate")
def simulate_market(
    seed: Annotated[int, typer.Option(help="The same seed gives the same market.")] = 1,
    rate: Annotated[float, typer.Option(min=0.1, max=100_000, help="Events per instrument and second, about.")] = 220.0,
    duration: Annotated[float | None, typer.Option(min=0, help="Simulated seconds. [default: for ever]")] = None,
    speed: Speed = "1",
    kafka: Kafka = KAFKA,
    topic: Topic = TOPIC,
    linger_ms: Linger = _LINGER_MS,
    instruments: Annotated[list[str] | None, typer.Option(help="SYMBOL.SIM; default BTCUSDT.SIM, ETHUSDT.SIM.")] = None,
    scenario: Annotated[ScenarioName, typer.Option(help="What kind of market.")] = ScenarioName.NORMAL,
    second_venue: Annotated[
        bool, typer.Option("--second-venue", help="Also SYMBOL.SIM2: a venue that lags by 200 ms.")
    ] = False,
) -> None:
    """Publish a seeded, simulated market to Kafka."""
    from feature_cache.sources import publication  # noqa: PLC0415 - as above
    from feature_cache.sources.publisher import EventPublisher, with_resets  # noqa: PLC0415 - as above
    from feature_cache.sources.simulator import INSTRUMENTS, on_both_venues, simulate  # noqa: PLC0415 - as above

    factor = _factor(speed)
    names = list(instruments or INSTRUMENTS)
    if second_venue:
        names = on_both_venues(names)
    try:
        events = simulate(
            seed,
            names,
            events_per_second=rate,
            start_ns=time.time_ns(),
            duration_seconds=duration,
            scenario=scenario,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    publisher = EventPublisher(kafka, topic, linger_seconds=linger_ms / 1000)
    raise typer.Exit(publication.run(iter((with_resets(events, "simulation"),)), factor, publisher, "simulated"))


def _told(venue: ExchangeName | None, file_format: FormatName | None) -> session.Kind | None:
    """What the user says of the files."""
    from feature_cache.sources import session  # noqa: PLC0415 - as above

    if venue is not None:
        if file_format not in (None, FormatName.RAW):
            raise typer.BadParameter(
                f"of which venue they are, {file_format} files say themselves", param_hint="--venue"
            )
        return session.Kind(session.Format.RAW, venue.value.upper())
    return None if file_format is None else session.Kind(session.Format(file_format))


def _factor(speed: str) -> float | None:
    if speed == "max":
        return None
    try:
        factor = float(speed)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise typer.BadParameter("must be a positive number, or max", param_hint="--speed")
    return factor


if __name__ == "__main__":
    app()
