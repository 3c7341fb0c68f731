"""A dataset file holds just the samples it was made of, and says what they are."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.guest_sets import ALL, MIXED, RECORDED, REGISTERED, Trades, know
from typer.testing import CliRunner

from feature_cache.feature_set import FeatureSetError
from feature_cache.feature_sets import Registered
from feature_cache.features import MF1
from feature_cache.sources.session import read_session, session_files
from feature_cache.sources.simulator import simulate
from pretrade.client.cli.main import app
from pretrade.market.v1 import market_pb2 as pb
from torchserve import sources
from torchserve.dataset import Samples, SamplesError, collect
from torchserve.label import Label
from torchserve.sources import dataset_set, load_samples, read_dataset, write_dataset

SHARED = Path(__file__).parents[3] / "../shared/data"


def test_what_is_written_is_read_back_to_the_bit(samples: Samples, tmp_path: Path) -> None:
    write_dataset(samples, tmp_path / "a.parquet")
    read = read_dataset(tmp_path / "a.parquet")
    for column in ("rows", "eligible", "markout_bps", "time_ns", "sell", "instrument"):
        before, after = getattr(samples, column), getattr(read, column)
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    assert (read.instruments, read.source, read.sha256()) == (samples.instruments, samples.source, samples.sha256())
    write_dataset(read, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_the_columns_are_for_people_too(samples: Samples, tmp_path: Path) -> None:
    write_dataset(samples, tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["time", "instrument", "sell", "eligible", "markout_bps", *MF1.names]
    assert set(table.column("instrument").to_pylist()) == {"BTCUSDT.SIM"}
    assert samples.eligible[samples.sell].mean() == pytest.approx(
        np.array(table.column("eligible"))[np.array(table.column("sell"))].mean()
    )


def test_a_file_of_a_set_that_is_not_known_or_of_other_content_is_refused(samples: Samples, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_dataset(samples, path)
    table = pq.read_table(path)
    swapped = table.set_column(3, "eligible", table.column("eligible").take(np.arange(len(table))[::-1].copy()))
    pq.write_table(swapped, tmp_path / "changed.parquet")
    with pytest.raises(SamplesError, match="not those that its metadata tells of"):
        read_dataset(tmp_path / "changed.parquet")
    described = json.loads(table.schema.metadata[b"pretrade"]) | {"feature_set_fingerprint": 0xABC}
    pq.write_table(table.replace_schema_metadata({b"pretrade": json.dumps(described)}), tmp_path / "other.parquet")
    with pytest.raises(SamplesError, match=f"holds features of mf1/00000abc; known here are {MF1.version}"):
        read_dataset(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(SamplesError, match="not a dataset of pretrade"):
        read_dataset(tmp_path / "text.parquet")


@pytest.mark.long
def test_a_file_of_another_set_has_its_features_and_those_of_mf1_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, *ALL)
    path = tmp_path / "a.parquet"
    arguments = ["dataset", "build", "--seconds", "60", "--features", "recorded", "--horizon", "1", "--out", str(path)]
    built = CliRunner().invoke(app, arguments)
    assert built.exit_code == 0, built.output
    read = read_dataset(path)
    again = load_samples([], simulated_seconds=60, label=Label(horizon_seconds=1), feature_set=RECORDED)
    assert read.feature_set == dataset_set(path) == RECORDED
    assert (read.sha256(), read.rows.shape[1]) == (again.sha256(), len(RECORDED))
    of_mf1 = load_samples([], simulated_seconds=60, label=Label(horizon_seconds=1))
    assert read.of_mf1.sha256() == of_mf1.sha256()
    assert read.take(np.arange(5)).of_mf1.rows.shape == (5, len(MF1))
    assert load_samples([path]).feature_set == load_samples([path], feature_set=RECORDED).feature_set == RECORDED
    with pytest.raises(SamplesError, match=f"holds features of {RECORDED.version}, not {MF1.version}"):
        load_samples([path], feature_set=MF1)
    know(monkeypatch)
    with pytest.raises(SamplesError, match=f"of {RECORDED.version}; known here are {MF1.version}: .* in PRETRADE_FEA"):
        read_dataset(path)


def test_what_no_recording_has_cannot_be_learnt_from_and_a_guests_fault_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    know(monkeypatch, *ALL)
    with pytest.raises(SamplesError, match=r"no recording has urgency, which callers bring\. `pretrade dataset feat"):
        load_samples([], simulated_seconds=60, feature_set=MIXED)

    def broken(instrument: str) -> Trades:
        raise SystemError("no licence")

    know(monkeypatch, REGISTERED, Registered(RECORDED, broken, "the tests"))
    with pytest.raises(FeatureSetError, match=r"recorded of the tests: SystemError\('no licence'\)"):
        load_samples([], simulated_seconds=60, feature_set=RECORDED)


def test_nothing_that_happens_later_changes_what_is_known_now() -> None:
    events = list(simulate(11, duration_seconds=24))
    cut_ns = events[0].event_time_ns + 12_000_000_000
    changed = []
    for event in events:
        later = pb.MarketEvent()
        later.CopyFrom(event)
        if event.event_time_ns >= cut_ns and later.WhichOneof("event") in ("quote", "trade"):
            # Every price from here on is another one, in another direction, and sizes are a hundredfold.
            if later.WhichOneof("event") == "quote":
                later.quote.bid_ticks += 10**9
                later.quote.ask_ticks += 10**9
                later.quote.bid_lots *= 100
            else:
                later.trade.price_ticks += 10**9
                later.trade.lots *= 100
        changed.append(later)
    real, other = collect(events, "real"), collect(changed, "changed")
    known, other_known = real.time_ns <= cut_ns, other.time_ns <= cut_ns
    assert known.sum() == other_known.sum() > 100
    np.testing.assert_array_equal(real.rows[known], other.rows[other_known])
    past, other_past = (samples.time_ns + samples.label.span_ns <= cut_ns for samples in (real, other))
    np.testing.assert_array_equal(real.markout_bps[past], other.markout_bps[other_past])
    # And it does change what is known later, and the labels that look beyond.
    assert not np.array_equal(real.markout_bps[known], other.markout_bps[other_known])


def test_a_dataset_file_says_what_its_label_is(tmp_path: Path) -> None:
    path, label = tmp_path / "a.parquet", Label(horizon_seconds=0.5, delay_seconds=0.2, price="touch")
    write_dataset(load_samples([], simulated_seconds=12, label=label), path)
    assert load_samples([path]).label == load_samples([path], label=label).label == label
    with pytest.raises(SamplesError, match="holds another label"):
        load_samples([path], label=Label())
    table = pq.read_table(path)
    old = json.loads(table.schema.metadata[b"pretrade"]) | {"label": "side-signed mid markout"}
    pq.write_table(table.replace_schema_metadata({b"pretrade": json.dumps(old)}), path)
    with pytest.raises(SamplesError, match="does not say what its label is"):
        read_dataset(path)


def test_both_sides_of_an_instant_are_told_apart(samples: Samples) -> None:
    assert samples.sell.sum() * 2 == len(samples.sell)
    np.testing.assert_array_equal(samples.markout_bps[samples.sell], -samples.markout_bps[~samples.sell])


def test_a_recording_of_our_own_format_and_one_of_binance_give_samples(tmp_path: Path) -> None:
    if not SHARED.exists():
        pytest.skip("the recorded sessions are not there")
    for folder, instrument in (("kraken_v1", "XBT"), ("binance_spot", "BTCUSDT.BINANCE")):
        path = SHARED / folder
        if folder == "binance_spot":
            files = [next(path.glob("btcusdt_20240808*"))]
            head = []
            for event in read_session(files):
                head.append(event)
                if event.event_time_ns > head[0].event_time_ns + 20_000_000_000:
                    break
            samples = collect(head, "head")
        else:
            samples = load_samples([path])
            assert samples.source_sha256 == load_samples(session_files([path])).source_sha256
        assert len(samples.rows) > 100, folder
        assert any(instrument in name for name in samples.instruments)


def test_the_command_builds_a_file_that_show_describes(tmp_path: Path) -> None:
    out = tmp_path / "made" / "simulated.parquet"
    built = CliRunner().invoke(app, ["dataset", "build", "--out", str(out), "--seconds", "60"])
    assert built.exit_code == 0, built.output
    samples = read_dataset(out)
    assert samples.source == "simulated, 60 s, seed 1"
    shown = CliRunner().invoke(app, ["dataset", "show", str(out)])
    assert samples.sha256() in shown.output.replace("\n", "")
    assert samples.source_sha256 in built.output.replace("\n", "")
    refused = CliRunner().invoke(app, ["dataset", "build", "--out", str(tmp_path / "x.csv")])
    assert refused.exit_code == 2


def test_a_process_for_each_instrument_makes_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    here = load_samples([], simulated_seconds=20)
    monkeypatch.setattr(sources, "_WORTH_A_PROCESS", 0.0)
    assert load_samples([], simulated_seconds=20).sha256() == here.sha256()
    assert len(here.rows) > 100


def test_the_hash_of_what_samples_came_from_follows_seed_and_length() -> None:
    hashes = {
        load_samples([], seed=seed, simulated_seconds=seconds).source_sha256
        for seed, seconds in ((1, 6.0), (1, 6.0), (2, 6.0), (1, 7.0))
    }
    assert len(hashes) == 3


def test_samples_of_a_part_are_those_of_the_part(samples: Samples) -> None:
    index = np.array([5, 2, 9])
    part = samples.take(index)
    np.testing.assert_array_equal(part.rows, samples.rows[index])
    assert replace(part, source="x").sha256() == part.sha256() != samples.sha256()


def test_samples_of_a_csv_file_are_those_of_its_events(tmp_path: Path) -> None:
    """A recording of Tardis.dev is opened for training as for a replay; its times end at the microsecond."""
    rows = ["exchange,symbol,timestamp,local_timestamp,is_snapshot,side,price,amount\n"]
    for tenth in range(200):
        head = f"bybit,X,{1_723_161_255_000_000 + tenth * 100_000},{1_723_161_255_000_004 + tenth * 100_000}"
        flag = "true" if not tenth else "false"
        rows += [f"{head},{flag},bid,{100 + tenth % 7},{1 + tenth % 3}\n", f"{head},{flag},ask,{110 - tenth % 2},2\n"]
    (tmp_path / "book.csv").write_text("".join(rows))
    samples = load_samples([tmp_path])
    assert (samples.instruments, samples.source) == (("X.BYBIT",), "recorded: book.csv")
    assert len(samples.rows) > 50
    events = list(read_session(session_files([tmp_path])))
    assert collect(events, "").sha256() == samples.sha256()
