// Which of several servers is asked, and when again, in every way to ask.
import assert from "node:assert/strict";
import { createServer } from "node:net";
import { once } from "node:events";
import { test } from "node:test";

import { Client } from "pretrade";
import { Client as WebClient } from "pretrade/web";

import { asking, nameOf, order, ROOMY_MS, start, WAYS } from "./ways.js";

/** Two servers, of which the second one answers NO_TRADE, and what asks them. */
async function pair(t, way, options) {
  const [first, second] = [await start(t), await start(t)];
  second.answer({ action: "NO_TRADE" });
  return { first, second, ask: await asking(t, way, [first, second], options) };
}

for (const way of Object.keys(WAYS)) {
  test(`a decision says which server answered, by ${way}`, async (t) => {
    const { first, second, ask } = await pair(t, way);
    assert.equal((await ask(order)).server, nameOf(way, first));
    first.fail("UNAVAILABLE", { reason: "DRAINING" });
    assert.equal((await ask(order)).server, nameOf(way, second));
  });

  test(`what was cut off is asked on the same server first, and then on the next, by ${way}`, async (t) => {
    const { first, second, ask } = await pair(t, way);
    first.fail("UNAVAILABLE");
    assert.equal((await ask(order)).trades, true, "another process of it may have the key");
    assert.equal(second.orders.length, 0);
    first.fail("CANCELLED", { times: 2 });
    assert.equal((await ask(order)).trades, false);
  });

  test(`a server that hangs costs half of the deadline and then nothing, by ${way}`, async (t) => {
    const { first, ask } = await pair(t, way);
    assert.equal((await ask(order)).trades, true);
    first.hang();
    for (let call = 0; call < 3; call += 1) {
      assert.equal((await ask(order, { timeoutMs: 1_000 })).trades, false);
    }
    const began = performance.now();
    for (let call = 0; call < 5; call += 1) assert.equal((await ask(order)).trades, false);
    assert.ok(performance.now() - began < ROOMY_MS / 2, "it is not asked any more");
    first.resume();
    while (!(await ask(order)).trades);
  });

  test(`the next server answers while the first is gone, and until it is well, by ${way}`, async (t) => {
    const { first, ask } = await pair(t, way);
    await ask(order);
    await first.stop();
    for (let call = 0; call < 5; call += 1) assert.equal((await ask(order)).trades, false);
    await first.restart();
    while (!(await ask(order)).trades);
  });

  test(`a refusal leads to the other server, unless it is about the caller, by ${way}`, async (t) => {
    const { first, second, ask } = await pair(t, way);
    first.fail("RESOURCE_EXHAUSTED", { reason: "TOO_MANY_IN_FLIGHT", retryAfterMs: 60_000 });
    assert.equal((await ask(order)).trades, false);
    first.fail("RESOURCE_EXHAUSTED", { reason: "RATE_LIMITED", retryAfterMs: 10 });
    assert.equal((await ask(order)).trades, true);
    assert.equal(second.orders.length, 1);
  });

  test(`what has no key is asked again after a refusal alone, by ${way}`, async (t) => {
    const server = await start(t);
    const ask = await asking(t, way, [server]);
    server.fail("UNAVAILABLE");
    await assert.rejects(ask({ ...order, idempotencyKey: "" }), { status: "UNAVAILABLE" });
    server.fail("RESOURCE_EXHAUSTED", { retryAfterMs: 1 });
    assert.equal((await ask({ ...order, idempotencyKey: "" })).trades, true);
    assert.deepEqual(server.orders.map((asked) => asked.idempotencyKey), [""]);
  });

  test(`a server that was killed and started again answers the same call, by ${way}`, async (t) => {
    const server = await start(t);
    const ask = await asking(t, way, [server]);
    await ask(order);
    server.hang();
    const asked = ask(order);
    await server.stop();
    server.resume();
    await server.restart();
    assert.equal((await asked).trades, true);
  });

  test(`where no server can be reached the error names one, by ${way}`, async (t) => {
    const server = await start(t);
    const ask = await asking(t, way, [server]);
    await server.stop();
    await assert.rejects(ask(order, { timeoutMs: 1_000 }), ({ status, server: named }) => {
      // Who shares a call may be told at the end of its own deadline, before the call says why it fails.
      if (way.startsWith("shared") && status === "DEADLINE_EXCEEDED") return true;
      assert.deepEqual([status, named], ["UNAVAILABLE", nameOf(way, server)]);
      return true;
    });
  });
}

for (const [name, Connecting, own] of [["gRPC", Client, "address"], ["HTTP", WebClient, "url"]]) {
  test(`each server says how it is, by ${name}`, async (t) => {
    const [well, ill, gone] = [await start(t), await start(t), await start(t)];
    ill.isHealthy = false;
    await gone.stop();
    const client = await Connecting.connect([well[own], ill[own], gone[own]]);
    t.after(() => client.close());
    const expected = { [well[own]]: "SERVING", [ill[own]]: "NOT_SERVING", [gone[own]]: "UNREACHABLE" };
    assert.deepEqual(await client.health(), expected);
  });

  test(`a decision has all that the page names, by ${name}`, async (t) => {
    const server = await start(t);
    const client = await Connecting.connect(server[own]);
    t.after(() => client.close());
    const found = await client.decide({ ...order, orderRef: "mine" });
    found.message.modelName = "a model";
    found.message.budget = { usedUs: 1_500 };
    assert.deepEqual([found.server, found.modelName, found.usedMs, found.orderRef], [server[own], "a model", 1.5, "mine"]);
    assert.ok(Math.abs(found.decidedAt - Date.now()) < 60_000);
  });
}

for (const seconds of [1, 3, 6]) {
  test(`a server that is gone for ${seconds} s is looked for ten times a second`, async (t) => {
    const server = await start(t);
    const { port } = new URL(`http://${server.address}`);
    const client = await Client.connect(server.address, { timeoutMs: ROOMY_MS });
    t.after(() => client.close());
    await client.decide(order);
    await server.stop();
    let attempts = 0;
    const nobody = createServer((socket) => {
      attempts += 1;
      socket.destroy();
    });
    await once(nobody.listen(port, "127.0.0.1"), "listening");
    const asked = client.decide(order);
    await new Promise((resolve) => setTimeout(resolve, 1_000 * seconds));
    const made = attempts;
    await new Promise((resolve) => nobody.close(resolve));
    await server.restart();
    assert.equal((await asked).trades, true);
    assert.ok(made >= 3 * seconds, `${made} attempts; without other work they are ten a second`);
  });
}
