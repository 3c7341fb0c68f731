import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { Client, PretradeError } from "pretrade";

import { decided, order, refusal, serve } from "./scripted.js";

/** A client, which is closed when the test ends. Its deadline is longer than any test may take. */
async function connect(t, servers, options = {}) {
  const client = await Client.connect(servers, { timeoutMs: 20_000, ...options });
  t.after(() => client.close());
  return client;
}

/** Refuses the first calls. */
const refusing = (times, said) => ({
  decide: ({ order: asked }, number) => (number < times ? said : { decision: decided(asked) }),
});

for (const [code, pushbackMs, times, answered] of [
  ["RESOURCE_EXHAUSTED", 1, 6, true],
  ["RESOURCE_EXHAUSTED", -1, 1, false],
  ["RESOURCE_EXHAUSTED", "soon", 1, false],
  ["UNAVAILABLE", undefined, 2, true],
  ["CANCELLED", undefined, 2, true],
  ["INVALID_ARGUMENT", undefined, 1, false],
  ["INTERNAL", undefined, 1, false],
]) {
  test(`${code} with the pushback ${pushbackMs} is ${answered ? "" : "not "}asked again`, async (t) => {
    const server = await serve(t, refusing(times, refusal(code, { pushbackMs })));
    const client = await connect(t, server.address);
    if (answered) {
      assert.equal((await client.decide(order)).trades, true);
      assert.equal(server.calls.length, times + 1);
    } else {
      await assert.rejects(client.decide(order), { status: code });
      assert.equal(server.calls.length, 1);
    }
  });
}

test("a call is made again after the delay that the server names, and not before", async (t) => {
  const server = await serve(t, refusing(1, refusal("RESOURCE_EXHAUSTED", { pushbackMs: 120 })));
  const client = await connect(t, server.address);
  const began = performance.now();
  await client.decide(order);
  assert.ok(performance.now() - began >= 119);
});

test("a call whose delay would end after the deadline fails at once, with what the server said", async (t) => {
  const server = await serve(t, refusing(1, refusal("RESOURCE_EXHAUSTED", { pushbackMs: 60_000 })));
  const client = await connect(t, server.address);
  const began = performance.now();
  await assert.rejects(client.decide(order), { status: "RESOURCE_EXHAUSTED", retryAfterMs: 60_000 });
  assert.ok(performance.now() - began < 20_000);
  assert.equal(server.calls.length, 1);
});

test("callers of a server that refuses everything stop asking twice", async (t) => {
  const server = await serve(t, { decide: () => refusal("RESOURCE_EXHAUSTED", { pushbackMs: 0 }) });
  const client = await connect(t, server.address);
  await assert.rejects(client.decide(order), { status: "RESOURCE_EXHAUSTED" });
  assert.equal(server.calls.length, 25, "half of the tokens");
  await assert.rejects(client.decide(order), { status: "RESOURCE_EXHAUSTED" });
  assert.equal(server.calls.length, 26);
});

test("every attempt has the key of the first, and every order one of its own", async (t) => {
  const server = await serve(t, refusing(2, refusal("UNAVAILABLE")));
  const client = await connect(t, server.address);
  await client.decide(order);
  await client.decide(order);
  await client.decide({ ...order, idempotencyKey: "mine" });
  const keys = server.calls.map(({ request }) => request.order.idempotencyKey);
  assert.match(keys[0], /^[0-9a-f-]{36}$/);
  assert.deepEqual(keys.slice(1, 3), [keys[0], keys[0]]);
  assert.notEqual(keys[3], keys[0]);
  assert.equal(keys[4], "mine");
});

test("a call has a deadline, its own or the client's", async (t) => {
  const server = await serve(t, {});
  const client = await connect(t, server.address, { timeoutMs: 60_000 });
  const left = () => Number(server.calls.at(-1).getDeadline()) - Date.now();
  await client.decide(order);
  assert.ok(left() > 30_000 && left() <= 60_000, `${left()}`);
  await client.decide(order, { timeoutMs: 600_000 });
  assert.ok(left() > 300_000, `${left()}`);
  await assert.rejects(client.decide(order, { timeoutMs: 0 }), { reason: "INVALID_TIMEOUT", field: "timeoutMs" });
});

test("a call that is aborted ends with the signal's reason, and is not made again", async (t) => {
  const abort = new AbortController();
  const server = await serve(t, {
    decide: () => {
      abort.abort(new Error("enough"));
      return refusal("UNAVAILABLE");
    },
  });
  const client = await connect(t, server.address);
  await assert.rejects(client.decide(order, { signal: abort.signal }), { message: "enough" });
  assert.equal(server.calls.length, 1);
});

test("the second server answers when the first is lost, and the first again when it is back", async (t) => {
  const first = await serve(t, {});
  const second = await serve(t, {});
  const client = await connect(t, [first.address, second.address]);
  await client.decide(order);
  assert.deepEqual([first.calls.length, second.calls.length], [1, 0]);
  first.stop();
  for (let call = 0; call < 5; call += 1) await client.decide(order);
  assert.equal(second.calls.length, 5);
  const back = await serve(t, { port: first.port });
  while (back.calls.length === 0) await client.decide(order);
});

test("the second server is asked when the first lets deadlines pass, until its health says that it serves", async (t) => {
  const first = await serve(t, {});
  const second = await serve(t, {});
  const client = await connect(t, [first.address, second.address]);
  await client.decide(order);
  first.hush(true);
  const late = ({ status }) => assert.equal(status, "DEADLINE_EXCEEDED");
  while (second.calls.length === 0) await client.decide(order, { timeoutMs: 100 }).catch(late);
  const asked = first.calls.length;
  first.hush(false);
  while (first.calls.length === asked) await client.decide(order);
});

test("a client that is closed says so", async (t) => {
  const server = await serve(t, {});
  const client = await connect(t, server.address);
  const stream = client.stream();
  client.close();
  for (const ask of [client.decide(order), stream.decide(order)]) {
    await assert.rejects(ask, { status: "CANCELLED", message: "CANCELLED: the client is closed." });
  }
  await stream.close();
});

test("a program ends when its client is closed, also while another server cannot be reached", async (t) => {
  const [server, gone] = [await serve(t, {}), await serve(t, {})];
  gone.stop();
  const servers = JSON.stringify([server.address, gone.address]);
  const program = `
    import { Client } from "pretrade";
    const client = await Client.connect(${servers}, { timeoutMs: 20_000, connectMs: 3_600_000 });
    await client.decide(${JSON.stringify(order)});
    client.close();`;
  const child = spawn(process.execPath, ["--input-type=module", "-e", program], { stdio: "inherit" });
  t.after(() => child.kill());
  assert.deepEqual(await once(child, "exit"), [0, null]);
});

test("where no server can be reached, the error says which one was asked and what to look at", async (t) => {
  const server = await serve(t, {});
  const client = await connect(t, server.address, { timeoutMs: 1_000 });
  server.stop();
  await assert.rejects(client.decide(order), (error) => {
    assert.ok(error instanceof PretradeError);
    assert.deepEqual([error.status, error.server], ["UNAVAILABLE", server.address]);
    assert.match(error.message, /Is the server up/);
    return true;
  });
  await assert.rejects(Client.connect(server.address, { connectMs: 200 }), { status: "UNAVAILABLE" });
});

test("orders of a batch that the server has no place for are sent again, and no others", async (t) => {
  const full = { code: 8, reason: "OVERLOADED", message: "full", retryDelay: { seconds: 0n, nanos: 1_000_000 } };
  const wrong = { code: 3, reason: "INVALID_QUANTITY", field: "quantity", message: "no" };
  const outcome = (value) => ("code" in value ? { case: "error", value } : { case: "decision", value });
  const server = await serve(t, {
    decideBatch: ({ orders }, number) => ({
      results: orders.map((asked, place) => {
        const said = number === 0 ? [decided(asked), full, wrong, full][place] : decided(asked);
        return { orderRef: asked.orderRef, outcome: outcome(said) };
      }),
    }),
  });
  const client = await connect(t, server.address);
  const results = await client.decideBatch(["a", "b", "c", "d"].map((orderRef) => ({ ...order, orderRef })));
  assert.deepEqual(
    results.map(({ orderRef, decision, error }) => [orderRef, decision?.orderRef ?? error.reason]),
    [["a", "a"], ["b", "b"], ["c", "INVALID_QUANTITY"], ["d", "d"]],
  );
  const [sent, again] = server.calls.map(({ request }) => request.orders);
  assert.deepEqual(again.map((asked) => asked.idempotencyKey), [sent[1], sent[3]].map((asked) => asked.idempotencyKey));
});

test("orders that can only reduce say so in the call's metadata, if no other is among them", async (t) => {
  const server = await serve(t, {
    decideBatch: ({ orders }) => ({ results: orders.map((asked) => ({ orderRef: asked.orderRef })) }),
  });
  const client = await connect(t, server.address);
  const reducing = { ...order, reduceOnly: true };
  await client.decide(reducing);
  await client.decideBatch([reducing, order]);
  const said = server.calls.map(({ metadata }) => metadata.get("pretrade-reduce-only").length);
  assert.deepEqual(said, [1, 0]);
});

test("a token is read for every call, and travels over no network in the open", async (t) => {
  const tokenFile = join(mkdtempSync(join(tmpdir(), "pretrade-")), "token");
  const server = await serve(t, {});
  writeFileSync(tokenFile, "first\n");
  const client = await connect(t, server.address, { tokenFile });
  await client.decide(order, { headers: { traceparent: "00-1-1-01" } });
  writeFileSync(tokenFile, "second\n");
  await client.decide(order);
  const shown = server.calls.map(({ metadata }) => metadata.get("authorization")[0]);
  assert.deepEqual(shown, ["Bearer first", "Bearer second"]);
  assert.deepEqual(server.calls[0].metadata.get("traceparent"), ["00-1-1-01"]);
  rmSync(tokenFile);
  for (const ask of [client.decide(order), client.stream().decide(order)]) {
    await assert.rejects(ask, { status: "UNAUTHENTICATED", reason: "TOKEN_FILE", field: "tokenFile" });
  }
  await assert.rejects(Client.connect("192.0.2.1:7001", { tokenFile }), { reason: "TOKEN_IN_THE_OPEN" });
});

for (const [change, reason, field] of [
  [{ limit_price: 1 }, "UNKNOWN_FIELD", "limit_price"],
  [{ side: "BUY" }, "INVALID_SIDE", "side"],
  [{ quantity: "1" }, "INVALID_TYPE", "quantity"],
  [{ limitPrice: null }, "INVALID_TYPE", "limitPrice"],
  [{ features: { featureSetId: "f", values: ["1"] } }, "INVALID_TYPE", "features"],
]) {
  test(`an order with ${JSON.stringify(change)} is refused before anything is sent`, async (t) => {
    const server = await serve(t, {});
    const client = await connect(t, server.address);
    await assert.rejects(client.decide({ ...order, ...change }), { status: "INVALID_ARGUMENT", reason, field });
    assert.equal(server.calls.length, 0);
  });
}
