"""What a model has seen is measured so that later samples are inside and corrupted ones are not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from feature_cache import features
from feature_cache.domain import LOOK_NS, Domain, Watch
from feature_cache.features import MF1
from torchserve.dataset import Samples
from torchserve.domain import Caught, caught, domain_of, false_alarms, read_by
from torchserve.fitting import Fitted
from torchserve.training import TrainedModel, TrainingSettings, split_by_time


@pytest.fixture(scope="module")
def domain(models: dict[str, TrainedModel]) -> Domain:
    return Domain(models["champion"].domain or {})


@pytest.fixture(scope="module")
def later(samples: Samples, settings: TrainingSettings) -> Samples:
    """What measures the model, which nothing of it was made from."""
    return samples.take(split_by_time(samples.time_ns, settings).test)


@pytest.fixture(scope="module")
def found(domain: Domain, later: Samples) -> dict[tuple[str, str], Caught]:
    return {(one.feature, one.corruption): one for one in caught(domain, later, domain.names)}


def fitted(model: TrainedModel) -> Fitted:
    return Fitted(model.weights, model.network, model.rounds)


@pytest.mark.long
def test_trees_read_what_they_split_by_and_a_network_reads_all(
    models: dict[str, TrainedModel], samples: Samples
) -> None:
    champion = fitted(models["champion"])
    lowest, highest = samples.rows[:500].copy(), samples.rows[:500].copy()
    for name in features.NAMES:
        column = features.INDEX[name]
        lowest[:, column], highest[:, column] = -1e9, 1e9
        assert (champion.margin()(lowest) != champion.margin()(highest)).any() == (name in read_by(champion, MF1)), name
        lowest[:, column] = highest[:, column] = samples.rows[:500, column]
    assert read_by(fitted(models["challenger"]), MF1) == list(features.NAMES)


@pytest.mark.long
def test_what_was_seen_goes_through_the_metadata_and_is_the_same_when_it_is_made_again(
    models: dict[str, TrainedModel], samples: Samples, settings: TrainingSettings, later: Samples, domain: Domain
) -> None:
    for model in models.values():
        split = split_by_time(samples.time_ns, settings)
        again = domain_of(fitted(model), samples.take(split.train), samples.take(split.between))
        assert json.dumps(again) == json.dumps(model.domain)
    read = Domain(json.loads(json.dumps(models["champion"].domain)))
    assert (read.distances(later.rows) == domain.distances(later.rows)).all()


@pytest.mark.parametrize("name", ["champion", "challenger"])
def test_at_most_one_in_two_hundred_later_samples_is_refused(
    name: str, models: dict[str, TrainedModel], later: Samples
) -> None:
    alarms = false_alarms(Domain(models[name].domain or {}), later)
    assert 0 <= alarms.at_once <= alarms.watched <= 0.005


def test_a_feature_that_is_undefined_as_never_before_is_refused_at_once(
    domain: Domain, found: dict[tuple[str, str], Caught], samples: Samples, settings: TrainingSettings
) -> None:
    split = split_by_time(samples.time_ns, settings)
    known = samples.rows[np.concatenate([split.train, split.between])]
    unheard = 0
    for name in domain.names:
        alone = np.isnan(known[:, domain.columns]).sum(axis=1) == 1
        if not (alone & np.isnan(known[:, features.INDEX[name]])).any():
            assert found[name, "undefined"].at_once == 1.0, name
            unheard += 1
    assert unheard


def test_absurd_values_are_refused_at_once(domain: Domain, found: dict[tuple[str, str], Caught]) -> None:
    for name in domain.names:
        # What is near to 0 is not absurd when it is a thousand times as large.
        assert found[name, "times 1000"].at_once > 0.8, name


def test_a_turned_sign_is_refused_soon(domain: Domain, found: dict[tuple[str, str], Caught]) -> None:
    for name in domain.names:
        one = found[name, "sign turned"]
        assert one.seconds is not None, name
        assert one.seconds < 30, name
        if name not in features.MF1.signed:
            assert one.at_once == 1.0, "it cannot be negative"


def test_a_stuck_feature_is_refused_soon_and_as_long_as_it_is(
    domain: Domain, found: dict[tuple[str, str], Caught]
) -> None:
    for name in domain.names:
        one = found[name, "frozen"]
        assert one.seconds is not None, name
        assert one.seconds < 10, name
        assert one.watched > 0.7, name


def test_an_alarm_ends_when_the_feature_is_right_again(domain: Domain, later: Samples) -> None:
    rows = later.rows[~later.sell]
    stuck = rows.copy()
    column = int(domain.columns[0])
    stuck[:, column] = rows[0, column]
    watch = Watch(domain)
    assert seen(watch, stuck, 0)[-1]
    now_right = seen(watch, rows, len(rows))
    assert not now_right[60:].any(), "at most twice the bound is remembered"


def test_a_quiet_market_is_not_stuck(domain: Domain, later: Samples) -> None:
    for row in later.rows[~later.sell][:100]:
        assert not seen(Watch(domain), np.repeat(row[None], 500, axis=0), 0).any()


def seen(watch: Watch, rows: NDArray[np.float32], first: int) -> NDArray[np.bool_]:
    return np.array([watch.see(row, (first + i) * LOOK_NS + 1) for i, row in enumerate(rows)], dtype=np.bool_)
