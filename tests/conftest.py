"""The embedded stack's servers for tests: started once, each test with a clean state of its own."""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
from support.browser import browser  # noqa: F401 - a fixture
from support.databases import empty_database
from support.harness import product, product_stack  # noqa: F401 - fixtures
from support.js_client import js_client  # noqa: F401 - a fixture
from support.rig import open_rig, replica_stack  # noqa: F401 - fixtures

from feature_cache.features import N_FEATURES
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.client.proxies import spare_this_machine

spare_this_machine()
# A server takes longer to start inside Envoy: tests that mean that edge say so.
os.environ.setdefault("PRETRADE_GRPC__EDGE", "grpcio")
# A Java runtime has taken 48 s to start beside other work; the default is for a user who waits.
os.environ.setdefault("PRETRADE_LOCAL_START_TIMEOUT_SECONDS", "150")
pytest_plugins = (
    "support.ci_verdict",
    "support.figures",
    "support.hangs",
    "support.left_out",
    "support.own_logs",
    "support.seeds",
    "support.side_by_side",
)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Valkey and PostgreSQL, shared by all tests of the session; who stops or fills them starts a stack of its own."""
    settings = LocalSettings(dir=tmp_path_factory.mktemp("servers"))
    with Stack(settings, parts={"valkey", "postgres"}) as stack:
        yield stack


@pytest.fixture
def redis_url(servers: Stack) -> str:
    """URL of an empty Valkey."""
    url = servers.endpoints.redis_url
    assert url is not None
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


@pytest.fixture
def database_url(servers: Stack) -> Iterator[str]:
    """SQLAlchemy URL of an empty PostgreSQL database."""
    with empty_database(servers) as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.stack)])
def audit_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty audit database: of SQLite, and of PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'audit.db'}"
    url: str = request.getfixturevalue("database_url")
    return url


@pytest.fixture
def kafka_bootstrap_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a broker with no topics, of this test alone: topics have fixed names, and it starts in 0.1 s."""
    with Stack(LocalSettings(dir=tmp_path_factory.mktemp("broker")), parts={"broker"}) as stack:
        address = stack.endpoints.kafka_bootstrap_servers
        assert address is not None
        yield address


@pytest.fixture(scope="session")
def model_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a champion and a challenger, trained on random rows whose first feature decides.

    Of the processes that run tests side by side (`-n`) the first one that needs it makes it for all.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    store = folder / "models"
    with (folder / "models.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not store.is_dir():
            made = tmp_path_factory.mktemp("models") / "store"
            _write_models(made)
            made.rename(store)
    return store


def _write_models(store: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # TorchServe's package leaves a file open when it is imported
        # Here, because every run of a single unit test would pay for importing torch.
        from torchserve.dataset import Samples  # noqa: PLC0415
        from torchserve.export import metadata_of, write_archive  # noqa: PLC0415
        from torchserve.label import Label  # noqa: PLC0415
        from torchserve.training import Kind, TrainingSettings, train  # noqa: PLC0415

    label = Label(horizon_seconds=0.1, worst_markout_bps=-0.5)  # no row shares anything with the next
    random = np.random.default_rng(1)
    n = 4_000
    rows = random.normal(size=(n, N_FEATURES)).astype(np.float32)
    markout = rows[:, 0] + random.normal(scale=0.5, size=n)
    samples = Samples(
        rows=rows,
        eligible=markout >= label.worst_markout_bps,
        markout_bps=markout,
        time_ns=np.arange(n, dtype=np.int64) * 100_000_000,
        sell=np.arange(n) % 2 == 1,
        instrument=np.zeros(n, dtype=np.int16),
        instruments=("RANDOM.SIM",),
        source="random rows",
        label=label,
    )
    settings = TrainingSettings(trees=20, epochs=2, label=label, valid_days=None)
    store.mkdir()
    # Trees on all features, whose scores differ from row to row: the rows of tests are random, too.
    kinds: dict[str, Kind] = {"champion": "xgboost", "challenger": "torch"}
    for name, kind in kinds.items():
        model = train(name, samples, settings, kind)
        write_archive(model, metadata_of(model, samples, settings), store)
