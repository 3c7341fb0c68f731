import assert from "node:assert/strict";
import { test } from "node:test";

import { Client } from "pretrade";
import { FakeServer } from "pretrade/testing";

const order = { instrument: "BTCUSDT.SIM", side: "buy", quantity: 1, strategy: "test" };

async function open(t, options = {}) {
  const server = await FakeServer.start();
  const client = await Client.connect(server.address, { timeoutMs: 20_000, ...options });
  t.after(() => {
    client.close();
    return server.stop();
  });
  return { server, client, shared: client.shared() };
}

const asking = (shared, count, changes = {}) =>
  Promise.allSettled(
    Array.from({ length: count }, (_, number) => shared.decide({ ...order, orderRef: `${number}`, ...changes })),
  );

test("orders of the same moment go together, 64 in a call", async (t) => {
  const { server, shared } = await open(t);
  const found = await asking(shared, 200);
  assert.deepEqual(found.map(({ value }) => value.orderRef), found.map((_, number) => `${number}`));
  assert.equal(server.headers.length, 4);
});

test("callers that ask one order after another share calls", async (t) => {
  const { server, shared } = await open(t);
  const each = async () => {
    for (let count = 0; count < 10; count += 1) await shared.decide(order);
  };
  await Promise.all(Array.from({ length: 32 }, each));
  assert.equal(server.orders.length, 320);
  assert.ok(server.headers.length <= 160, `${server.headers.length} calls`);
});

test("orders that come while four calls are under way wait for one of them", async (t) => {
  const { server, shared } = await open(t);
  server.hang();
  const asked = [];
  for (let moment = 0; moment < 10; moment += 1) {
    asked.push(asking(shared, 2));
    await new Promise(setImmediate);
  }
  server.resume();
  await Promise.all(asked);
  assert.equal(server.headers.length, 5);
});

test("a lone caller has calls of its own", async (t) => {
  const { server, shared } = await open(t);
  for (let call = 0; call < 3; call += 1) await shared.decide(order);
  assert.equal(server.headers.length, 3);
});

test("a call that fails fails for all that shared it and for no other", async (t) => {
  const { server, shared } = await open(t);
  server.fail("INTERNAL", { reason: "BROKEN" });
  const failed = (await asking(shared, 100)).filter(({ reason }) => reason);
  assert.deepEqual(new Set(failed.map(({ reason }) => reason.reason)), new Set(["BROKEN"]));
  assert.ok([36, 64].includes(failed.length), `${failed.length}`);
});

test("orders of a call that was lost are decided by the next with the keys that they had", async (t) => {
  const { server, shared } = await open(t);
  server.fail("UNAVAILABLE", { times: 2 });
  const found = await asking(shared, 10);
  assert.ok(found.every(({ value }) => value.trades));
  assert.equal(server.headers.length, 3);
});

test("callers of a server that hangs are told at their own deadlines, and others are decided", async (t) => {
  const { server, shared } = await open(t);
  server.hang();
  const patient = shared.decide({ ...order, orderRef: "patient" });
  await assert.rejects(shared.decide({ ...order, orderRef: "hasty" }, { timeoutMs: 100 }), {
    status: "DEADLINE_EXCEEDED",
    orderRef: "hasty",
  });
  server.resume();
  assert.ok((await patient).trades);
  await assert.rejects(shared.decide(order, { timeoutMs: 0 }), { reason: "INVALID_TIMEOUT" });
});

test("the server is told how long each caller waits", async (t) => {
  const { server, shared } = await open(t);
  await Promise.all([shared.decide(order, { timeoutMs: 15_000 }), shared.decide(order, { timeoutMs: 3_600_000 })]);
  const [short, long] = server.orders.map(({ timeout }) => Number(timeout.seconds));
  assert.ok(short <= 15 && long > 3_000, `${short} ${long}`);
  assert.equal(server.headers.length, 1);
});

test("orders that can only reduce go in calls of their own, which say so", async (t) => {
  const { server, shared } = await open(t);
  await Promise.all([asking(shared, 2), asking(shared, 2, { reduceOnly: true })]);
  assert.deepEqual(server.headers.map((headers) => headers["pretrade-reduce-only"]), ["1", undefined]);
});

test("an order that is broken before it is sent disturbs no other", async (t) => {
  const { shared } = await open(t);
  const broken = assert.rejects(shared.decide({ ...order, side: "BUY" }), { reason: "INVALID_SIDE" });
  assert.ok((await shared.decide(order)).trades);
  await broken;
});

test("a client that is closed says so to those who share its calls", async (t) => {
  const { client, shared } = await open(t);
  client.close();
  await assert.rejects(shared.decide(order), { status: "CANCELLED" });
});
