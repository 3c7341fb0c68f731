// What callers may rely on in a FakeServer, because a real server does the same, over gRPC and over HTTP: one suite for
// all. Alone it asks a FakeServer. tests/contract/test_edges.py has it ask real servers, which PRETRADE_TEST_ADDRESS and
// PRETRADE_TEST_URL name.
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { after, test } from "node:test";

import { Client as NodeClient } from "pretrade";
import { FakeServer } from "pretrade/testing";
import { Client as WebClient } from "pretrade/web";

const { PRETRADE_TEST_ADDRESS: address, PRETRADE_TEST_URL: url } = process.env;
const server = address ? { address, url } : await FakeServer.start();
const options = { timeoutMs: 10_000, connectMs: 30_000 };
const clients = {
  "over gRPC": await NodeClient.connect(server.address, options),
  "over HTTP": await WebClient.connect(server.url, options),
};
after(async () => {
  for (const client of Object.values(clients)) client.close();
  await server.stop?.();
});

const order = (orderRef, changes = {}) => ({
  orderRef, instrument: "BTCUSDT.SIM", side: "buy", quantity: 1, strategy: "test", ...changes,
});

for (const [how, client] of Object.entries(clients)) {
  test(`a sound order has a decision with id, reference, time and reasons, ${how}`, async () => {
    const found = await client.decide(order("mine"), { explain: true });
    assert.match(found.decisionId, /^[0-9a-f-]{36}$/);
    assert.equal(found.orderRef, "mine");
    assert.ok(["TRADE", "NO_TRADE", "ABSTAIN"].includes(found.action));
    assert.equal(found.trades, found.action === "TRADE");
    assert.ok(found.reasons.length > 0);
    assert.notEqual(found.source, "UNSPECIFIED");
    assert.ok(found.message.decidedAt.seconds > 1_700_000_000n);
    assert.ok(found.explanation.message);
    assert.notEqual((await client.decide(order("mine"))).decisionId, found.decisionId);
  });

  for (const [changes, field, reason] of [
    [{ instrument: "" }, "instrument", "UNKNOWN_INSTRUMENT"],
    [{ quantity: 0 }, "quantity", "INVALID_QUANTITY"],
    [{ quantity: Infinity }, "quantity", "INVALID_QUANTITY"],
    [{ quantity: NaN }, "quantity", "INVALID_QUANTITY"],
    [{ limitPrice: -1 }, "limit_price", "INVALID_LIMIT_PRICE"],
    [{ strategy: "" }, "strategy", "INVALID_STRATEGY"],
    [{ strategy: "s".repeat(65) }, "strategy", "INVALID_STRATEGY"],
    [{ orderRef: "r".repeat(65) }, "order_ref", "INVALID_ORDER_REF"],
    [{ idempotencyKey: "k".repeat(65) }, "idempotency_key", "INVALID_IDEMPOTENCY_KEY"],
  ]) {
    test(`an order with ${JSON.stringify(changes)} is refused, alone and in a batch, ${how}`, async () => {
      const broken = order("broken", changes);
      await assert.rejects(client.decide(broken), { status: "INVALID_ARGUMENT", field, reason });
      const [sound, other] = await client.decideBatch([order("sound"), broken]);
      assert.ok(sound.decision);
      assert.deepEqual([other.error.status, other.error.field, other.error.reason], ["INVALID_ARGUMENT", field, reason]);
    });
  }

  test(`a key gives the same decision for the same order alone, ${how}`, async () => {
    const keyed = order("keyed", { idempotencyKey: randomUUID() });
    const { decisionId } = await client.decide(keyed);
    assert.equal((await client.decide(keyed)).decisionId, decisionId);
    const [again] = await client.decideBatch([keyed]);
    assert.equal(again.decision.decisionId, decisionId);
    const refusal = { status: "ALREADY_EXISTS", reason: "IDEMPOTENCY_KEY_REUSED", field: "idempotency_key" };
    await assert.rejects(client.decide({ ...keyed, quantity: 2 }), refusal);
    assert.notEqual((await client.decide({ ...keyed, strategy: "other" })).decisionId, decisionId);
  });

  for (const size of [0, 1_025]) {
    test(`a batch of ${size} orders is refused, ${how}`, async () => {
      const orders = Array.from({ length: size }, (_, number) => order(`${number}`));
      await assert.rejects(client.decideBatch(orders), { status: "INVALID_ARGUMENT", field: "orders" });
    });
  }

  test(`orders that share calls have their own answers, and a broken one its own error, ${how}`, async () => {
    const shared = client.shared();
    const refs = Array.from({ length: 100 }, (_, number) => `shared-${number}`);
    const broken = assert.rejects(shared.decide(order("broken", { quantity: -1 })), { reason: "INVALID_QUANTITY" });
    const found = await Promise.all(refs.map((ref) => shared.decide(order(ref))));
    assert.deepEqual(found.map((decision) => decision.orderRef), refs);
    await broken;
  });
}

test("a key is the same over gRPC and over HTTP", async () => {
  const keyed = order("keyed", { idempotencyKey: randomUUID(), limitPrice: 60_000.5, reduceOnly: true });
  const [one, other] = Object.values(clients);
  assert.equal((await one.decide(keyed)).decisionId, (await other.decide(keyed)).decisionId);
});

test("a stream answers every order, and goes on after a broken one", async () => {
  const stream = clients["over gRPC"].stream();
  const refs = Array.from({ length: 50 }, (_, number) => `${number}`);
  const broken = assert.rejects(stream.decide(order("broken", { quantity: -1 })), { field: "quantity" });
  const found = await Promise.all(refs.map((ref) => stream.decide(order(ref))));
  await broken;
  assert.deepEqual(found.map((decision) => decision.orderRef), refs);
  assert.equal((await stream.decide(order("last"))).orderRef, "last");
  await stream.close();
});
