"""Parts of the embedded stack that are other people's servers: start, kill, restart, stop."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from sqlalchemy import create_engine, text
from support.harness import listened_on

from local.stack.errors import DirectoryInUseError, PartFailedError, StackError
from local.stack.settings import LocalSettings, secret
from local.stack.stack import Progress, Stack

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(LocalSettings(dir=tmp_path_factory.mktemp("stack")), parts={"valkey", "broker", "postgres"}) as stack:
        yield stack


def redis_client(stack: Stack) -> redis.Redis:
    assert stack.endpoints.redis_url
    return redis.Redis.from_url(stack.endpoints.redis_url)


async def topics(stack: Stack, *, create: str | None = None) -> list[str]:
    client = AIOKafkaAdminClient(bootstrap_servers=stack.endpoints.kafka_bootstrap_servers)
    await client.start()
    try:
        if create:
            await client.create_topics([NewTopic(create, num_partitions=1, replication_factor=1)])
        return list(await client.list_topics())
    finally:
        await client.close()


def test_valkey_keeps_what_it_was_told_over_a_restart(stack: Stack) -> None:
    with redis_client(stack) as client:
        client.set("trading_state", "HALTED")
    stack["valkey"].restart()
    with redis_client(stack) as client:
        assert client.get("trading_state") == b"HALTED"


def test_valkey_that_was_killed_serves_the_same_port_again(stack: Stack) -> None:
    valkey = stack["valkey"]
    valkey.kill()
    assert not valkey.alive
    assert valkey.ending == "was ended by SIGKILL"
    with redis_client(stack) as client, pytest.raises(redis.ConnectionError):
        client.ping()
    valkey.start()
    with redis_client(stack) as client:
        assert client.ping()


def test_a_paused_part_answers_nothing_until_it_is_resumed(stack: Stack) -> None:
    assert stack.endpoints.redis_url
    stack["valkey"].pause()
    try:
        client = redis.Redis.from_url(stack.endpoints.redis_url, socket_timeout=0.2)
        with client, pytest.raises(redis.TimeoutError):
            client.ping()
    finally:
        stack["valkey"].resume()
    with redis_client(stack) as client:
        assert client.ping()


def test_a_paused_part_can_be_stopped(stack: Stack) -> None:
    stack["valkey"].pause()
    stack["valkey"].stop()
    assert not stack["valkey"].alive
    stack["valkey"].start()


async def test_the_broker_makes_topics_and_forgets_them_when_killed(stack: Stack) -> None:
    assert "events" in await topics(stack, create="events")
    stack["broker"].kill()
    stack["broker"].start()
    assert "events" not in await topics(stack)


def test_postgres_keeps_committed_rows_when_killed(stack: Stack) -> None:
    assert stack.endpoints.database_url
    engine = create_engine(stack.endpoints.database_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE kept (id int)"))
        connection.execute(text("INSERT INTO kept VALUES (7)"))
    engine.dispose()
    backends = stack["postgres"].tree()
    assert len(backends) > 1
    stack["postgres"].kill()
    stack["postgres"].start()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT id FROM kept")).scalar_one() == 7
    engine.dispose()


def test_postgres_lets_nobody_in_without_the_password(stack: Stack) -> None:
    port = int(stack.endpoints.database_url.rsplit(":", 1)[1].split("/")[0])  # type: ignore[union-attr]
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(host="127.0.0.1", port=port, user="pretrade", password="wrong", dbname="pretrade")


def test_postgres_does_not_run_as_root(stack: Stack) -> None:
    assert stack["postgres"].tree()[0].uids().effective != 0


def test_only_the_loopback_interface_is_listened_on(stack: Stack) -> None:
    assert listened_on(stack) == {"127.0.0.1"}


def test_the_stack_file_names_what_runs_and_is_for_our_eyes_only(stack: Stack, tmp_path: Path) -> None:
    with Stack(LocalSettings(dir=tmp_path), parts={"valkey"}) as own:
        path = tmp_path / "stack.json"
        content = json.loads(path.read_text())
        assert content["pid"] == os.getpid()
        assert content["endpoints"]["redis_url"] == own.endpoints.redis_url
        assert content["processes"] == {"valkey": own["valkey"].pid}
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_memory_is_counted_by_part(stack: Stack) -> None:
    memory = stack.memory_bytes()
    assert set(memory) == {"valkey", "broker", "postgres"}
    assert all(1 << 20 < used < 1 << 30 for used in memory.values())


def test_a_directory_is_used_by_one_stack_at_a_time(tmp_path: Path) -> None:
    with Stack(LocalSettings(dir=tmp_path), parts={"valkey"}):
        with pytest.raises(DirectoryInUseError, match=f"pid {os.getpid()}"):
            Stack(LocalSettings(dir=tmp_path), parts={"valkey"}).start()
        assert (tmp_path / "stack.json").exists()
    with Stack(LocalSettings(dir=tmp_path), parts={"valkey"}) as next_stack:
        assert next_stack["valkey"].alive


def test_a_failed_start_names_the_part_and_its_log_and_stops_the_rest(tmp_path: Path) -> None:
    (tmp_path / "postgres" / "cluster").mkdir(parents=True)  # a cluster that is none
    seen: list[Progress] = []
    stack = Stack(LocalSettings(dir=tmp_path), parts={"valkey", "broker", "postgres"}, report=seen.append)
    with pytest.raises(PartFailedError) as failure:
        stack.start()
    assert failure.value.part == "postgres"
    assert failure.value.log_path == tmp_path / "logs" / "postgres.log"
    assert "could not access the server configuration file" in failure.value.log_tail
    assert "exit code" in failure.value.reason
    assert [progress.state for progress in seen if progress.step == "postgres"] == [
        "starting",
        "failed",
        "stopping",
        "stopped",
    ]
    assert not any(process.alive for process in stack.processes.values())
    assert not (tmp_path / "stack.json").exists()


def test_an_external_part_is_used_and_not_started(stack: Stack, tmp_path: Path) -> None:
    external = stack.endpoints.redis_url
    with Stack(LocalSettings(dir=tmp_path, redis_url=secret(external)), parts={"valkey", "broker"}) as other:
        assert set(other.processes) == {"broker"}
        assert other.endpoints.redis_url == external
    assert stack["valkey"].alive


def test_endpoints_are_not_known_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(StackError):
        _ = Stack(LocalSettings(dir=tmp_path), parts={"valkey"}).endpoints
