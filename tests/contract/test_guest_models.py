"""A model of a guest's feature set on the real TorchServe: a replica learns its set, and asks it for nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.guest_model import rows_of, write_guest_model
from support.guest_sets import MIXED, REGISTERED, know

from feature_cache.feature_set import SetRow
from feature_cache.features import MF1
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from server.inference import model_sets
from server.inference.batcher import BatcherSettings
from server.inference.embedded import EmbeddedScorer
from server.inference.outcome import BatchFailedError, Outcome
from server.inference.replica import Replica, ReplicaLimits, ReplicaSettings
from server.inference.rows import Scored
from server.models.archive import Archive, read_archive

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Archive]]:
    """Where the guest's model is served, and its archive."""
    store = tmp_path_factory.mktemp("guests")
    write_guest_model(MIXED, store / "champion.mar")
    settings = LocalSettings(dir=tmp_path_factory.mktemp("guest-models"), model_store=store)
    with Stack(settings, parts={"primary"}) as stack:
        yield str(stack.endpoints.primary), read_archive(Path(store) / "champion.mar")


@pytest.mark.long
async def test_a_replica_learns_the_set_of_its_model_and_scores_as_the_model_does(
    served: tuple[str, Archive], monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, REGISTERED)
    monkeypatch.setattr(model_sets, "_known", {})
    endpoint, archive = served
    loop = asyncio.get_running_loop()
    # Not about time: other work on the machine must not have an answer given up.
    patient = BatcherSettings(min_patience_seconds=10, max_patience_seconds=10)
    limits = ReplicaLimits(ReplicaSettings(warm_up_seconds=0.0), patient)
    replica = Replica("primary", endpoint, "champion", None, limits, clock=loop.time, random=lambda: 0.5)
    assert replica.feature_set is MF1, "until the model has said otherwise"
    async with replica:
        async with asyncio.timeout(60):
            await replica.proven.wait()
        assert replica.feature_set is MIXED
        rows = rows_of(MIXED, 5)
        answered = await asyncio.gather(
            *(replica.batcher.submit(SetRow.of(MIXED, row.tobytes()), loop.time() + 30) for row in rows)
        )
        files = archive.files
        in_process = EmbeddedScorer("champion", archive.version, files["metadata.json"], files["weights.bin"])
        scores = in_process.scores(rows.tobytes())
        for one, score in zip(answered, scores, strict=True):
            assert isinstance(one, Scored)
            assert (one.model.feature_set, one.score) == (MIXED, float(np.float32(score)))
        with pytest.raises(BatchFailedError, match="model_error"):
            await replica.ask([bytes(MF1.row_bytes)], None)
        with pytest.raises(BatchFailedError) as mixed:
            await replica.ask([bytes(MF1.row_bytes), SetRow.of(MIXED, bytes(MIXED.row_bytes))], None)
        assert mixed.value.outcome is Outcome.OVERLOAD
