from __future__ import annotations

from feature_cache.sources.facts_picture import picture
from feature_cache.sources.market_facts import tape
from feature_cache.sources.simulator import simulate


def test_a_picture_has_all_six_panels_and_the_same_tapes_give_the_same_bytes() -> None:
    tapes = [tape(simulate(seed, ["BTCUSDT.SIM"], duration_seconds=60)) for seed in (1, 2)]
    drawn = picture(tapes[0], tapes[1:])
    assert drawn == picture(tapes[0], tapes[1:])
    for title in ("mid, bp", "100 ms moves", "takers' signs", "more trades", "are larger", "response of the mid"):
        assert title in drawn
