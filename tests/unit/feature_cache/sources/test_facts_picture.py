from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from feature_cache.sources.facts_picture import picture
from feature_cache.sources.market_facts import Tape, tape
from feature_cache.sources.simulator import simulate

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def tapes() -> list[Tape]:
    return [tape(simulate(seed, ["BTCUSDT.SIM"], duration_seconds=30)) for seed in (1, 2, 3)]


def test_a_picture_has_a_line_of_each_session_in_each_of_six_panels(tapes: list[Tape]) -> None:
    drawn = ElementTree.fromstring(picture(tapes[0], tapes[1:]))
    panels = drawn.findall(f"{SVG}g")
    assert len(panels) == 6
    for panel in panels:
        lines = panel.findall(f"{SVG}polyline")
        assert [line.get("stroke") for line in lines] == ["#1f77b4", "#1f77b4", "black"], "the recorded one on top"
        frame = panel.find(f"{SVG}rect")
        assert frame is not None
        for line in lines:
            x, y = np.array([point.split(",") for point in line.get("points", "").split()], dtype=float).T
            assert 0 <= x.min() < x.max() <= float(frame.get("width", 0))
            assert 0 <= y.min() <= y.max() <= float(frame.get("height", 0))


def test_the_same_tapes_give_the_same_few_lines_of_text(tapes: list[Tape]) -> None:
    drawn = picture(tapes[0], tapes[1:])
    assert drawn == picture(tapes[0], tapes[1:])
    assert len(drawn.splitlines()) < 300
