"""The fake Envoy, for tests."""

from __future__ import annotations

from local.bench.fake_envoy import LANE, FakeEnvoy, fake_envoy
from support.twins import compiled_here


def fake_envoy_here() -> FakeEnvoy:
    """The Envoy of this process. The test is skipped where nothing can be compiled."""
    compiled_here(LANE)
    return fake_envoy()
