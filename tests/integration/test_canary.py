"""A canary on a whole server with real model servers: begun, applied, judged, ended, and in the audit."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import sqlalchemy as sa
from support.harness import INSTRUMENTS, Load, Product, eventually, stack_admin_channel
from typer.testing import CliRunner

from feature_cache import features
from local.demo import variants
from local.demo.variants import inverted, recalibrated
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.audit.v1 import audit_pb2, audit_pb2_grpc
from pretrade.client.cli.main import app
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.store.canaries import CANARY_EVENTS, SCORE_PAIRS
from server.audit.store.schema import DECISIONS
from server.canary.plan import Canary
from server.models.registry import Registry

pytestmark = pytest.mark.stack

MOST_AFFECTED = 1_000
"""Decisions of a canary that a server remembers."""
OF_SCORES = {"rank", "brier", "bad_trades", "missed_trades"}
"""Checks of what a model says that roll a canary back where outcomes are waited for. Which is the first to be sure is
a matter of how fast the orders and the market's outcomes come in."""
LOAD_SECONDS = 120.0
"""Two TorchServe workers may have to start, on a machine with other work."""


@pytest.fixture
def registry(product: Product) -> Registry:
    store = product.stack.endpoints.model_store
    assert store is not None
    return Registry(Path(store))


@pytest.fixture
def champion(registry: Registry) -> str:
    version: str = json.loads((registry.root / "champion.json").read_text())["version"]
    return version


@pytest.fixture
def admin(product: Product) -> Iterator[admin_pb2_grpc.AdminServiceStub]:
    """The admin service; whatever canary a test leaves is ended, and the market stands still again."""
    yield product.admin
    product.market.moving = None
    found = product.admin.GetCanary(admin_pb2.GetCanaryRequest(), timeout=5.0)
    if found.canary.state == admin_pb2.CANARY_STATE_RUNNING:
        product.admin.AbortCanary(admin_pb2.AbortCanaryRequest(author="test", reason="heal"), timeout=30.0)


def start(
    admin: admin_pb2_grpc.AdminServiceStub, version: str, *steps: float, dry_run: bool = False
) -> admin_pb2.StartCanaryResponse:
    request = admin_pb2.StartCanaryRequest(
        model_version=version, steps=steps, author="ann", reason="looks better", dry_run=dry_run
    )
    return admin.StartCanary(request, timeout=LOAD_SECONDS)


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value.code(), refused.value.details() or ""


def canary_of(admin: admin_pb2_grpc.AdminServiceStub) -> admin_pb2.Canary:
    return admin.GetCanary(admin_pb2.GetCanaryRequest(), timeout=5.0).canary


class Traders:
    """Orders on both sides of a market that moves, several at a time."""

    def __init__(self, product: Product) -> None:
        self._product = product
        product.market.moving = np.random.default_rng(3)
        self._numbers = itertools.count()
        self.decisions: list[pb.Decision] = []
        self.strategies: dict[str, str] = {}
        """Of each decision, by its id."""

    def trade(self, orders: int) -> list[pb.Decision]:
        """Decides so many orders; every one of them is answered."""
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda _: self._decide(), range(orders)))
        self.decisions += made
        return made

    def _decide(self) -> pb.Decision:
        number = next(self._numbers)
        strategy = f"s{number % 50}"
        side = pb.SIDE_SELL if number % 3 else pb.SIDE_BUY
        decision = self._product.decide(side=side, strategy=strategy, deadline_seconds=2.0)
        self.strategies[decision.decision_id] = strategy
        return decision


@pytest.mark.fault(
    "A15",
    "A canary's scores are inverted",
    "Only its share of the orders is affected. The evidence rolls it back without an operator.",
)
def test_a_canary_with_inverted_scores_is_out_by_itself_and_all_of_it_is_in_the_audit(
    product: Product, admin: admin_pb2_grpc.AdminServiceStub, registry: Registry, champion: str
) -> None:
    version, traders = inverted(registry, champion), Traders(product)
    product.decide_until(pb.SOURCE_PRIMARY)
    started = start(admin, version, 0.5, 1.0)
    assert (started.canary.model_version, started.canary.champion_version) == (version, champion)
    assert (started.change.subject, started.change.author) == ("canary", "ann")
    assert started.change.diff[0].endswith(f"→ {version} at 50% of the flows")

    def trade_on() -> admin_pb2.Canary:
        traders.trade(40)
        return canary_of(admin)

    ended = eventually(trade_on, lambda canary: canary.state == admin_pb2.CANARY_STATE_ROLLED_BACK, LOAD_SECONDS)
    assert ended.verdict == admin_pb2.CANARY_VERDICT_WORSE
    guilty = {check.name for check in ended.checks if check.verdict == admin_pb2.CANARY_VERDICT_WORSE}
    assert guilty & OF_SCORES, "it is in time and answers everything: what is wrong is what it says"
    assert ended.weight == 0
    assert pb.SOURCE_CANARY not in {decision.source for decision in traders.trade(40)}

    affected = {one.decision_id: one for one in traders.decisions if one.source == pb.SOURCE_CANARY}
    assert all(one.model_version == version for one in affected.values())
    request = admin_pb2.GetCanaryRequest(affected_decisions=MOST_AFFECTED)
    listed = set(admin.GetCanary(request, timeout=5.0).affected_decision_ids)
    assert set(affected) <= listed or len(listed) == MOST_AFFECTED, "all of them, or as many as it remembers"
    url = product.stack.endpoints.database_url
    assert url is not None
    engine = sa.create_engine(url)
    try:
        with engine.connect() as sql:

            def in_sql() -> tuple[set[str], list[str], int]:
                mine = sa.select(DECISIONS.c.decision_id).where(DECISIONS.c.model_version == version)
                turns = sa.select(CANARY_EVENTS.c.event).where(CANARY_EVENTS.c.canary_id == started.canary.canary_id)
                pairs = sa.select(sa.func.count()).select_from(SCORE_PAIRS)
                pairs = pairs.where(SCORE_PAIRS.c.challenger_version == version)
                found = set(sql.scalars(mine)), list(sql.scalars(turns.order_by("at"))), sql.scalar(pairs) or 0
                sql.rollback()
                return found

            shipped = eventually(
                in_sql, lambda found: found[0] >= set(affected) and len(found[1]) == 2 and found[2] > 0
            )
    finally:
        engine.dispose()
    assert listed <= shipped[0]
    assert shipped[1] == ["started", "rolled_back"]


@pytest.mark.long
def test_a_canary_decides_its_flows_until_an_operator_ends_it(
    product: Product, admin: admin_pb2_grpc.AdminServiceStub, registry: Registry, champion: str
) -> None:
    version, traders = recalibrated(registry, champion), Traders(product)
    product.decide_until(pb.SOURCE_PRIMARY)
    before = canary_of(admin).canary_id
    assert start(admin, version, 0.5, 1.0, dry_run=True).change.dry_run
    assert canary_of(admin).canary_id == before
    canary_id = start(admin, version, 0.5, 1.0).canary.canary_id
    code, why = refusal(lambda: start(admin, version))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "is under way" in why
    eventually(lambda: {one.source for one in traders.trade(50)}, lambda found: pb.SOURCE_CANARY in found, LOAD_SECONDS)
    assert product.metric("pretrade_canary_weight", model="default") == 0.5
    plan = Canary.start(canary_id, version, champion, (0.5, 1.0), "ann", "looks better", now=0.0)
    answered = [traders.strategies[one.decision_id] for one in traders.decisions if one.source == pb.SOURCE_CANARY]
    assert all(plan.takes(INSTRUMENTS[0], strategy) for strategy in answered), "other flows never see it"
    held = admin.SetCanaryWeight(
        admin_pb2.SetCanaryWeightRequest(weight=1.0, hold=True, author="ann", reason="all of it"), timeout=5.0
    )
    assert (held.canary.weight, held.canary.held) == (1.0, True)
    assert product.status().canary.model_version == version
    history = eventually(
        lambda: admin.GetCanary(admin_pb2.GetCanaryRequest(), timeout=5.0).history, lambda found: len(found.at_ns) > 0
    )
    assert list(history.at_ns) == sorted(history.at_ns)
    assert all(len(one.samples) == len(history.at_ns) for one in history.checks)
    aborted = admin.AbortCanary(admin_pb2.AbortCanaryRequest(author="ann", reason="enough"), timeout=30.0)
    assert aborted.canary.state == admin_pb2.CANARY_STATE_ABORTED
    assert pb.SOURCE_CANARY not in {one.source for one in traders.trade(50)}
    code, why = refusal(lambda: admin.PromoteCanary(admin_pb2.PromoteCanaryRequest(author="a", reason="b"), timeout=5))
    assert (code, why) == (grpc.StatusCode.FAILED_PRECONDITION, "no canary is under way")


@pytest.mark.long
def test_a_champion_is_replaced_under_load_while_the_model_in_process_is_asked_first(
    product: Product, admin: admin_pb2_grpc.AdminServiceStub, registry: Registry, champion: str
) -> None:
    """Every order is decided, by the version that its decision names: a replay of that gives the same bits."""
    version = recalibrated(registry, champion, 1.5)
    broken = variants._variant(registry, champion, lambda metadata: metadata["calibration"].update(intercept=9.0))
    chain = admin_pb2.SetChainRequest(stages=["embedded", "model", "rules"], author="ann", reason="the shortest way")
    admin.SetChain(chain, timeout=5.0)
    product.decide_until(pb.SOURCE_EMBEDDED)

    def decided_by(wanted: str) -> None:
        """Waits until the model in the server's process is this version, and for some decisions of it."""
        newest = lambda: (load.decisions[-1].source, load.decisions[-1].model_version)  # noqa: E731 - short
        eventually(newest, lambda found: found == (pb.SOURCE_EMBEDDED, wanted), LOAD_SECONDS)
        load.wait_for_more(50)

    with Load(product, count=2) as load:
        load.wait_for_more(50)
        assert "off its canned scores" in refusal(lambda: start(admin, broken))[1]
        load.wait_for_more(50)
        assert {one.model_version for one in load.decisions} == {champion}
        start(admin, version, 0.5, 1.0)
        admin.PromoteCanary(admin_pb2.PromoteCanaryRequest(author="ann", reason="better"), timeout=LOAD_SECONDS)
        decided_by(version)
        admin.RollBack(admin_pb2.RollBackRequest(author="ann", reason="it was not"), timeout=LOAD_SECONDS)
        decided_by(champion)
    registry.path(broken).unlink()
    assert not load.errors
    kinds: dict[tuple[pb.Source.ValueType, str], list[pb.Decision]] = defaultdict(list)
    for one in load.decisions:
        kinds[one.source, one.model_version].append(one)
    sources = {pb.SOURCE_EMBEDDED, pb.SOURCE_CANARY, pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY}
    assert set(kinds) <= set(itertools.product(sources, (champion, version)))
    with stack_admin_channel(product.stack.endpoints) as channel:
        audit = audit_pb2_grpc.AuditServiceStub(channel)
        for one in itertools.chain.from_iterable(found[:5] + found[-5:] for found in kinds.values()):
            replayed = audit.ReplayDecision(
                audit_pb2.ReplayDecisionRequest(decision_id=one.decision_id), timeout=LOAD_SECONDS
            )
            assert (replayed.equal, replayed.score) == (True, one.score), (one, replayed)


def test_models_are_listed_and_what_is_none_is_refused(
    product: Product, admin: admin_pb2_grpc.AdminServiceStub, registry: Registry, champion: str
) -> None:
    listed = {one.model_version: one for one in admin.ListModels(admin_pb2.ListModelsRequest(), timeout=60.0).models}
    assert set(listed) == {record.version for record in registry.records()}
    assert set(listed[champion].loaded_on) == {"primary", "secondary"}
    assert listed[champion].feature_set == features.MF1.version
    decides = product.status().champion.model_version
    assert [version for version, one in listed.items() if "champion" in one.aliases] == [decides]
    assert refusal(lambda: start(admin, "00" * 8))[0] is grpc.StatusCode.NOT_FOUND
    assert refusal(lambda: start(admin, champion))[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal(lambda: start(admin, champion, 0.5, 0.1))[0] is grpc.StatusCode.INVALID_ARGUMENT
    nobody = admin_pb2.StartCanaryRequest(model_version=champion, reason="x")
    assert refusal(lambda: admin.StartCanary(nobody, timeout=5.0))[0] is grpc.StatusCode.INVALID_ARGUMENT
    alias = admin_pb2.SetModelAliasRequest(alias="favourite", model_version=champion, author="a", reason="b")
    assert refusal(lambda: admin.SetModelAlias(alias, timeout=5.0))[0] is grpc.StatusCode.INVALID_ARGUMENT
    load = admin_pb2.LoadModelRequest(model_version=champion, replicas=["secondary"], author="ann", reason="once more")
    loaded = admin.LoadModel(load, timeout=LOAD_SECONDS).change
    kept = admin.ListChanges(admin_pb2.ListChangesRequest(subject="model"), timeout=30.0).changes[0]
    assert (kept.change_id, kept.subject, kept.author) == (loaded.change_id, f"model/{champion}", "ann")
    assert list(kept.diff) == [f"model/{champion}: loaded on secondary"]
    back = admin_pb2.RollBackRequest(author="a", reason="b")
    if "previous" not in registry.aliases():
        assert refusal(lambda: admin.RollBack(back, timeout=5.0))[0] is grpc.StatusCode.NOT_FOUND


@pytest.mark.long
def test_the_commands_ask_before_orders_are_at_stake_and_tell_by_their_exit_code(
    product: Product, admin: admin_pb2_grpc.AdminServiceStub, registry: Registry, champion: str
) -> None:
    version = recalibrated(registry, champion)
    target = ["--target", str(product.stack.endpoints.admin)]

    def run(*command: str) -> tuple[int, str]:
        env = {"PRETRADE_JOURNAL__PATH": str(product.stack.endpoints.journal)}  # as in the server's own container
        result = CliRunner().invoke(app, [*command, *target], env=env)
        return result.exit_code, result.output

    code, shown = run("models", "list", "--json")
    assert code == 0
    assert version in {one["modelVersion"] for one in json.loads(shown)["models"]}
    assert run("canary", "start", version)[0] == 1, "there is no terminal to ask on"
    assert canary_of(admin).model_version != version or canary_of(admin).state != admin_pb2.CANARY_STATE_RUNNING
    assert run("canary", "start", version, "--steps", "5,x", "--yes")[0] == 2
    code, shown = run("canary", "start", version, "--yes", "--expect", "999999")
    assert (code, "not 999999" in shown) == (4, True)
    assert run("canary", "start", version, "--steps", "5,50,100", "--dry-run")[0] == 0
    code, shown = run("canary", "start", version, "--steps", "5,50,100", "--yes", "--reason", "new data")
    assert (code, shown.strip()) == (0, f"canary {version}: RUNNING, 5% of the flows")
    code, shown = run("canary", "status", "--json")
    assert (code, json.loads(shown)["canary"]["reason"]) == (0, "new data")
    assert run("canary", "weight", "100", "--yes")[0] == 0
    assert run("canary", "abort")[0] == 0
    code, shown = run("canary", "status")
    assert code == 5
    assert "ABORTED" in shown
    assert run("canary", "promote", "--yes")[0] == 1
