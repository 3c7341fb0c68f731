"""Where samples come from: a recording, a simulation, or a dataset file made of either."""

from __future__ import annotations

import hashlib
import json
import multiprocessing as mp
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from feature_cache import feature_sets
from feature_cache.feature_set import FeatureSet
from feature_cache.features import MF1
from feature_cache.sources import simulator
from feature_cache.sources.session import read_session, session_files
from pretrade.market.v1 import market_pb2 as pb
from torchserve.dataset import STEP_NS, Market, Samples, SamplesError
from torchserve.label import Label

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIX: Final = ".parquet"
SIMULATED_SECONDS: Final = 3_600.0
"""Length of the simulated session that stands in for a recorded one. The simulated market gives little away: from 20
minutes of it a model may learn nothing."""

_WORTH_A_PROCESS: Final = 300.0
"""Simulated seconds that take longer than the start of a process."""
_EVENTS_PER_REPORT: Final = 20_000
_METADATA_KEY: Final = b"pretrade"
_BESIDE: Final = "mf1."
"""How the columns of `mf1` beside another set's begin."""

Report = Callable[[str], None]


def load_samples(
    data: list[Path],
    *,
    seed: int = 1,
    simulated_seconds: float = SIMULATED_SECONDS,
    label: Label | None = None,
    feature_set: FeatureSet | None = None,
    report: Report = lambda _: None,
) -> Samples:
    """Samples of a dataset file, of recordings, or of the simulator.

    Args:
        data: One `.parquet` of `write_dataset`, or what `load_market` takes.
        seed: Of the simulation.
        simulated_seconds: Its length.
        label: What is to be learnt; None for the default, or for what a dataset file has.
        feature_set: Of the rows; None for `mf1`, or for that of a dataset file.
        report: Called with what is being done.

    Raises:
        feature_cache.sources.session.SessionError: A recording cannot be read.
        SamplesError: A dataset file cannot be used.
    """
    if is_dataset(data):
        samples = read_dataset(data[0])
        if label not in (None, samples.label):
            raise SamplesError(f"{data[0]} holds another label, {samples.label.text}: build it again")
        if feature_set not in (None, samples.feature_set):
            raise SamplesError(f"{data[0]} holds features of {samples.feature_set.version}, not {feature_set.version}")
        return samples
    market = load_market(
        data, seed=seed, simulated_seconds=simulated_seconds, feature_set=feature_set or MF1, report=report
    )
    return market.samples(label or Label())


def load_market(
    data: list[Path],
    *,
    seed: int = 1,
    simulated_seconds: float = SIMULATED_SECONDS,
    feature_set: FeatureSet = MF1,
    report: Report = lambda _: None,
) -> Market:
    """Recordings, or a simulation, ready for any label.

    Args:
        data: Recordings, files or folders of them, in any format of `feature_cache.sources.session`. Empty for a
            simulation.
        seed: Of the simulation.
        simulated_seconds: Its length.
        feature_set: Of the samples' rows.
        report: Called with what is being done.

    Raises:
        feature_cache.sources.session.SessionError: A recording cannot be read.
        SamplesError: The set cannot be had from market data.
    """
    if data:
        files = session_files(data)
        source = "recorded: " + ", ".join(path.name for path in files)
        return Market(counted(read_session(files), report), source, sha256_of(files), feature_set)
    source = f"simulated, {simulated_seconds:.0f} s, seed {seed}"
    simulation = Path(simulator.__file__)
    code = sha256_of([simulation, *sorted(simulation.with_name("simulated").glob("*.py"))])
    origin = hashlib.sha256(f"{source} {code}".encode()).hexdigest()
    if feature_set != MF1:  # its computers may look at each other's instruments
        events = simulator.simulate(seed, duration_seconds=simulated_seconds)
        return Market(counted(events, report), source, origin, feature_set)
    return Market.joined(_simulated(seed, simulated_seconds, report), source, origin)


def load_events(
    data: list[Path],
    only: set[str],
    feature_set: FeatureSet = MF1,
    *,
    seed: int = 1,
    simulated_seconds: float = SIMULATED_SECONDS,
    report: Report = lambda _: None,
) -> Iterator[pb.MarketEvent]:
    """Events of some instruments from recordings, or from the simulated session that `load_market` takes instead.

    Args:
        data: See `load_market`.
        only: The instruments.
        feature_set: What they are for: computers of other sets than `mf1` may look at any instrument, so these get all.
        seed: Of the simulation.
        simulated_seconds: Its length.
        report: Called with what is being done.

    Raises:
        feature_cache.sources.session.SessionError: A recording cannot be read.
        SamplesError: The simulator knows no such instrument.
    """
    if data:
        return counted(read_session(session_files(data), only if feature_set == MF1 else None), report)
    simulated = only if feature_set == MF1 else only | set(simulator.INSTRUMENTS)
    try:
        return counted(simulator.simulate(seed, sorted(simulated), duration_seconds=simulated_seconds), report)
    except ValueError as error:
        raise SamplesError(f"without recordings the market is simulated: {error}") from error


def _simulated(seed: int, seconds: float, report: Report) -> list[Market]:
    """Simulated sessions of one instrument each: none depends on another, so each may have a process of its own."""
    processes = min(len(simulator.INSTRUMENTS), os.cpu_count() or 1)
    one = partial(_one_simulated, seed, seconds)
    report(f"simulating {seconds:,.0f} s of {' and '.join(simulator.INSTRUMENTS)}")
    if processes == 1 or seconds < _WORTH_A_PROCESS:
        return [one(name) for name in simulator.INSTRUMENTS]
    # An interrupt ends the parent, and that its children: each on its own would print where it was.
    with mp.get_context("spawn").Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        return pool.map(one, simulator.INSTRUMENTS, chunksize=1)


def _one_simulated(seed: int, seconds: float, name: str) -> Market:
    return Market(simulator.simulate(seed, [name], duration_seconds=seconds), "")


def is_dataset(data: Sequence[Path]) -> bool:
    """Whether this is a dataset file and no recordings."""
    return len(data) == 1 and data[0].suffix == SUFFIX


def write_dataset(samples: Samples, path: Path) -> None:
    """Writes samples as Parquet: a row a sample, its columns named, and what they are in the file's metadata.

    The same samples give the same bytes.
    """
    import pyarrow as pa  # noqa: PLC0415 - a build without a file does not need it
    import pyarrow.parquet as pq  # noqa: PLC0415

    described = {
        "feature_set": samples.feature_set.id,
        "feature_set_fingerprint": samples.feature_set.fingerprint,
        "label": samples.label.model_dump(),
        "step_ns": STEP_NS,
        "source": samples.source,
        "source_sha256": samples.source_sha256,
        "samples_sha256": samples.sha256(),
        "instruments": list(samples.instruments),
    }
    names = pa.DictionaryArray.from_arrays(pa.array(samples.instrument), pa.array(samples.instruments, pa.string()))
    columns = {
        "time": pa.array(samples.time_ns, pa.timestamp("ns", tz="UTC")),
        "instrument": names,
        "sell": pa.array(samples.sell),
        "eligible": pa.array(samples.eligible),
        "markout_bps": pa.array(samples.markout_bps),
        # NaN stays NaN and does not become null: a model is fed what it was trained on.
        **{name: pa.array(samples.rows[:, i]) for i, name in enumerate(samples.feature_set.names)},
    }
    if samples.beside is not None:
        columns |= {_BESIDE + name: pa.array(samples.beside[:, i]) for i, name in enumerate(MF1.names)}
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(described, sort_keys=True).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path)


def read_dataset(path: Path) -> Samples:
    """Reads what `write_dataset` wrote.

    Raises:
        SamplesError: It cannot be read, is of another feature set, or its content is not what it says.
    """
    import pyarrow as pa  # noqa: PLC0415 - as above
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        table = pq.read_table(path)
        described = json.loads((table.schema.metadata or {})[_METADATA_KEY])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise SamplesError(f"{path} is not a dataset of pretrade: {error}") from error
    if described.get("step_ns") != STEP_NS:
        raise SamplesError(f"{path} has step_ns {described.get('step_ns')!r}, this code {STEP_NS!r}: build it again")
    feature_set = _set_of(path, described)
    named = table.column("instrument").combine_chunks()
    samples = Samples(
        rows=_rows(table, feature_set.names),
        eligible=table.column("eligible").to_numpy(),
        markout_bps=table.column("markout_bps").to_numpy(),
        time_ns=table.column("time").cast(pa.int64()).to_numpy(),
        sell=table.column("sell").to_numpy(),
        instrument=named.indices.to_numpy(zero_copy_only=False).astype(np.int16),
        instruments=tuple(described["instruments"]),
        source=described["source"],
        source_sha256=described["source_sha256"],
        label=_label_of(path, described),
        feature_set=feature_set,
        beside=None if feature_set == MF1 else _rows(table, [_BESIDE + name for name in MF1.names]),
    )
    if tuple(named.dictionary.to_pylist()) != samples.instruments or samples.sha256() != described["samples_sha256"]:
        raise SamplesError(f"{path}: the samples are not those that its metadata tells of")
    return samples


def dataset_set(path: Path) -> FeatureSet:
    """The feature set of a dataset file.

    Raises:
        SamplesError: It cannot be read, or the set is not known here.
    """
    import pyarrow as pa  # noqa: PLC0415 - as above
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        return _set_of(path, json.loads((pq.read_schema(path).metadata or {})[_METADATA_KEY]))
    except (OSError, pa.ArrowException, KeyError, json.JSONDecodeError) as error:
        raise SamplesError(f"{path} is not a dataset of pretrade: {error}") from error


def _set_of(path: Path, described: Mapping[str, Any]) -> FeatureSet:
    fingerprint = described.get("feature_set_fingerprint")
    found = feature_sets.by_fingerprint(fingerprint) if isinstance(fingerprint, int) else None
    if found is None or described.get("feature_set") != found.id:
        named = described.get("feature_set")
        named = f"{named}/{fingerprint:08x}" if isinstance(fingerprint, int) else repr(named)
        raise SamplesError(
            f"{path} holds features of {named}; known here are {feature_sets.names()}: build it again, or name the file"
            f" of the set in {feature_sets.FILE_VARIABLE}"
        )
    return found


def _rows(table: pa.Table, names: Sequence[str]) -> NDArray[np.float32]:
    return np.column_stack([table.column(name).to_numpy() for name in names]).astype(np.float32, order="C")


def _label_of(path: Path, described: Mapping[str, Any]) -> Label:
    try:
        return Label.model_validate(described["label"])
    except (KeyError, ValidationError) as error:
        raise SamplesError(f"{path} does not say what its label is: build it again") from error


def sha256_of(files: Iterable[Path]) -> str:
    """One hash of the content of several files, in this order."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def counted(events: Iterable[pb.MarketEvent], report: Report) -> Iterator[pb.MarketEvent]:
    """The same events; reports now and then how many there were."""
    for number, event in enumerate(events):
        if number % _EVENTS_PER_REPORT == 0:
            report(f"replaying: {number:,} events")
        yield event
