"""`pretrade up --replicas N`: real TorchServes in one role, of which half may die and one may stand still."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, cast

import pytest
from support.decision_server import DecisionServer
from support.harness import ROOMY, Load, Market, eventually

from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.client.stack_file import running_stack
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack


@pytest.mark.parametrize("replicas", [pytest.param(number, marks=pytest.mark.long) for number in (2, 4)])
def test_half_of_the_primarys_servers_are_killed_and_no_call_fails(
    replicas: int, tmp_path: Path, model_store: Path
) -> None:
    names = [f"primary-{number}" for number in range(1, replicas + 1)]
    settings = LocalSettings(
        dir=tmp_path / "stack",
        model_store=model_store,
        replicas=replicas,
        replica_tokens=True,
        start_timeout_seconds=180,
    )
    with Stack(settings, parts={"valkey", "primary"}) as stack:
        endpoints = stack.endpoints
        assert set(stack.processes) == {"valkey", *names}
        assert set(running_stack(settings.dir).processes) == {"valkey", *names}
        assert set(endpoints.token_files) == set(names)
        assert len(set(str(endpoints.primary).split(","))) == replicas
        market = Market(str(endpoints.redis_url))
        writer = threading.Thread(target=market.run)
        writer.start()
        server_settings = {
            **ROOMY,
            "REPLICAS__SECONDARY": "",
            "REPLICAS__MANAGEMENT": json.dumps(dict(endpoints.management)),
            "REPLICAS__TOKEN_FILES": json.dumps(dict(endpoints.token_files)),
        }
        try:
            with DecisionServer(
                tmp_path / "server", market.redis_url, primary=str(endpoints.primary), settings=server_settings
            ) as server:
                server.wait_until_well(*names)
                with Load(cast(Any, server)) as load:
                    load.wait_for_more(50)
                    for name in names[: replicas // 2]:
                        stack[name].kill()
                    eventually(lambda: sum(server.replica(name).healthy for name in names), (replicas // 2).__eq__)
                    load.wait_for_more(100)
                    if replicas > 2:
                        stack[names[-1]].pause()
                        eventually(lambda: server.replica(names[-1]).healthy, lambda healthy: not healthy)
                        load.wait_for_more(100)
                        stack[names[-1]].resume()
                        for name in names[: replicas // 2]:
                            stack.restart(name)
                        server.wait_until_well(*names)
                assert not load.errors
                assert [one.source for one in load.decisions].count(pb.SOURCE_PRIMARY) > 0.8 * len(load.decisions)
        finally:
            market.stopped.set()
            writer.join()
