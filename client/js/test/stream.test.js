import assert from "node:assert/strict";
import { test } from "node:test";

import { Client } from "pretrade";
import { FakeServer } from "pretrade/testing";

import { decided, order, refusal, serve } from "./scripted.js";

const result = (asked) => ({ result: { orderRef: asked.orderRef, outcome: { case: "decision", value: decided(asked) } } });

async function open(t, script, options = {}) {
  const server = await serve(t, { stream: script });
  const client = await Client.connect(server.address, { timeoutMs: 20_000, ...options });
  t.after(() => client.close());
  return { server, stream: client.stream() };
}

const answering = (call) => {
  call.on("data", ({ order: asked }) => call.write(result(asked)));
  call.on("end", () => call.end());
};

test("many callers share one stream, and each gets its own decision", async (t) => {
  const { server, stream } = await open(t, answering);
  const refs = Array.from({ length: 100 }, (_, number) => `order-${number}`);
  const decisions = await Promise.all(refs.map((orderRef) => stream.decide({ ...order, orderRef })));
  assert.deepEqual(decisions.map((decision) => decision.orderRef), refs);
  await stream.close();
  assert.equal(server.calls.length, 1);
  await assert.rejects(stream.decide(order), { status: "CANCELLED" });
});

for (const [how, ends] of [
  ["ends well", (call) => call.end()],
  ["is reset", (call) => call.emit("error", refusal("UNAVAILABLE"))],
]) {
  test(`orders of a stream that ${how} before they are decided are sent again with their keys`, async (t) => {
    const keys = [[], []];
    const { stream } = await open(t, (call, number) => {
      call.on("data", ({ order: asked }) => {
        keys[Math.min(number, 1)].push(asked.idempotencyKey);
        if (number > 0) call.write(result(asked));
        else if (keys[0].length === 1) call.write(result(asked));
        else if (keys[0].length === 3) ends(call);
      });
      call.on("end", () => call.end());
    });
    const decisions = await Promise.all([order, order, order].map((each) => stream.decide(each)));
    assert.equal(decisions.length, 3);
    assert.deepEqual(keys[1].toSorted(), keys[0].slice(1).toSorted());
    await stream.close();
  });
}

test("a stream goes to the second server when the first is gone, and back when it serves again", async (t) => {
  const first = await serve(t, { stream: answering });
  const second = await serve(t, { stream: answering });
  const client = await Client.connect([first.address, second.address], { timeoutMs: 20_000 });
  t.after(() => client.close());
  const stream = client.stream();
  await stream.decide(order);
  first.stop();
  await stream.decide(order);
  assert.equal(second.calls.length, 1);
  const back = await serve(t, { stream: answering, port: first.port });
  while (back.calls.length === 0) await stream.decide(order);
  await stream.close();
});

test("an order that is refused is sent again after the delay that the server names", async (t) => {
  let asks = 0;
  const { stream } = await open(t, (call) => {
    call.on("data", ({ order: asked }) => {
      const value = { code: 8, reason: "OVERLOADED", message: "full", retryDelay: { seconds: 0n, nanos: 1_000_000 } };
      asks += 1;
      call.write(asks > 2 ? result(asked) : { result: { orderRef: asked.orderRef, outcome: { case: "error", value } } });
    });
    call.on("end", () => call.end());
  });
  assert.equal((await stream.decide(order)).trades, true);
  assert.equal(asks, 3);
  await stream.close();
});

test("an order without a result fails at its deadline, which the server is told, and the stream goes on", async (t) => {
  let told;
  const { stream } = await open(t, (call) => {
    call.on("data", ({ order: asked }) => {
      if (asked.orderRef === "slow") told = asked.timeout;
      else call.write(result(asked));
    });
    call.on("end", () => call.end());
  });
  const slow = stream.decide({ ...order, orderRef: "slow" }, { timeoutMs: 200 });
  await assert.rejects(stream.decide({ ...order, orderRef: "slow" }), { reason: "ORDER_REF_UNDER_WAY" });
  await assert.rejects(slow, { status: "DEADLINE_EXCEEDED", orderRef: "slow" });
  assert.ok(told.nanos > 0 && told.nanos <= 200_000_000);
  await stream.decide(order);
  await stream.close();
});

test("a late answer is not taken for that of a later order with the same reference", async (t) => {
  const server = await FakeServer.start();
  t.after(() => server.stop());
  const client = await Client.connect(server.address, { timeoutMs: 20_000 });
  t.after(() => client.close());
  server.decideBy(({ quantity }) => ({ action: quantity === 1 ? "TRADE" : "NO_TRADE" }));
  const stream = client.stream();
  const same = { ...order, orderRef: "same" };
  server.hang();
  await assert.rejects(stream.decide(same, { timeoutMs: 200 }), { status: "DEADLINE_EXCEEDED", orderRef: "same" });
  const later = stream.decide({ ...same, quantity: 2 });
  server.resume();
  assert.equal((await later).action, "NO_TRADE");
  await stream.close();
});

test("a stream on which many orders had no answer is replaced", async (t) => {
  const server = await FakeServer.start();
  t.after(() => server.stop());
  const client = await Client.connect(server.address, { timeoutMs: 20_000 });
  t.after(() => client.close());
  const stream = client.stream();
  server.hang();
  const late = Array.from({ length: 1_024 }, () => stream.decide(order, { timeoutMs: 50 }));
  for (const { reason } of await Promise.allSettled(late)) assert.equal(reason.status, "DEADLINE_EXCEEDED");
  server.resume();
  assert.equal((await stream.decide(order)).trades, true);
  assert.ok(server.orders.length < 100, "those that nobody waits for were left");
  await stream.close();
});
