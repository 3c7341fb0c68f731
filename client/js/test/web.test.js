import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { once } from "node:events";
import { test } from "node:test";

import { FakeServer } from "pretrade/testing";
import { Client, PretradeError } from "pretrade/web";

const order = { instrument: "BTCUSDT.SIM", side: "buy", quantity: 1, strategy: "test" };

async function start(t, options) {
  const server = await FakeServer.start(options);
  t.after(() => server.stop());
  return server;
}

async function connect(t, servers, options = {}) {
  const client = await Client.connect(servers, { timeoutMs: 20_000, ...options });
  t.after(() => client.close());
  return client;
}

/** A server that answers every path alike. */
async function answering(t, answer) {
  const server = createServer(answer).listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => server.close().closeAllConnections());
  return `http://127.0.0.1:${server.address().port}`;
}

test("the entry for browsers imports nothing of Node, and of packages protobuf alone", () => {
  const found = new Set();
  const foreign = new Set();
  const visit = (url) => {
    if (found.has(url.href)) return;
    found.add(url.href);
    for (const [, name] of readFileSync(url, "utf8").matchAll(/^(?:import|export)\b[^;]*?\bfrom "([^"]+)"/gms)) {
      name.startsWith(".") ? visit(new URL(name, url)) : foreign.add(name);
    }
  };
  visit(new URL(import.meta.resolve("pretrade/web")));
  assert.ok(found.size > 10);
  for (const name of foreign) assert.match(name, /^@bufbuild\/protobuf(\/|$)/);
});

for (const [status, facts, times, answered] of [
  ["RESOURCE_EXHAUSTED", { retryAfterMs: 1 }, 6, true],
  ["RESOURCE_EXHAUSTED", {}, 1, false],
  ["UNAVAILABLE", {}, 2, true],
  ["CANCELLED", {}, 2, true],
  ["INVALID_ARGUMENT", { reason: "INVALID_QUANTITY", field: "quantity" }, 1, false],
  ["UNAUTHENTICATED", { reason: "NO_TOKEN" }, 1, false],
  ["INTERNAL", {}, 1, false],
]) {
  test(`the problem ${status} ${JSON.stringify(facts)} is ${answered ? "" : "not "}asked again`, async (t) => {
    const server = await start(t);
    server.fail(status, { ...facts, times });
    const client = await connect(t, server.url);
    if (answered) {
      assert.equal((await client.decide(order)).trades, true);
      assert.equal(server.headers.length, times + 1);
    } else {
      const { reason, field } = facts;
      await assert.rejects(client.decide(order), { status, reason, field, server: server.url });
      assert.equal(server.headers.length, 1);
    }
  });
}

test("every attempt has the key of the first, and says what is left of the deadline", async (t) => {
  const server = await start(t);
  const client = await connect(t, server.url);
  server.fail("UNAVAILABLE");
  server.decideBy(({ idempotencyKey }) => {
    assert.match(idempotencyKey, /^[0-9a-f-]{36}$/);
    return {};
  });
  await client.decide(order, { timeoutMs: 15_000, headers: { traceparent: "00-1-1-01" } });
  const left = server.headers.map((headers) => Number(/^(\d+)m$/.exec(headers["grpc-timeout"])[1]));
  assert.ok(left[0] <= 15_000 && left[1] <= left[0] && left[1] > 0, `${left}`);
  assert.deepEqual(server.headers.map(({ traceparent }) => traceparent), ["00-1-1-01", "00-1-1-01"]);
  await client.decide(order, { timeoutMs: 2 ** 40 });
  assert.match(server.headers.at(-1)["grpc-timeout"], /^\d{1,8}S$/);
});

test("a call without an answer ends at its deadline, and one that is aborted with the signal's reason", async (t) => {
  const server = await start(t);
  const client = await connect(t, server.url);
  server.hang();
  const late = { status: "DEADLINE_EXCEEDED", server: server.url };
  await assert.rejects(client.decide(order, { timeoutMs: 50 }), late);
  await assert.rejects(client.decide(order, { signal: AbortSignal.timeout(50) }), { name: "TimeoutError" });
  server.resume();
});

test("the second server answers when the first is gone, and the first again when it is back", async (t) => {
  const [first, second] = [await start(t), await start(t)];
  const client = await connect(t, [first.url, second.url]);
  await client.decide(order);
  assert.deepEqual([first.orders.length, second.orders.length], [1, 0]);
  await first.stop();
  for (let call = 0; call < 5; call += 1) await client.decide(order);
  assert.equal(second.orders.length, 5);
  await first.restart();
  while (first.orders.length === 1) await client.decide(order);
});

test("a server that drains is left for the next, and used again when its health says so", async (t) => {
  const [first, second] = [await start(t), await start(t)];
  const client = await connect(t, [first.url, second.url]);
  first.isHealthy = false;
  first.fail("UNAVAILABLE", { reason: "DRAINING" });
  await client.decide(order);
  assert.deepEqual([first.orders.length, second.orders.length], [0, 1]);
  first.isHealthy = true;
  while (first.orders.length === 0) await client.decide(order);
});

test("a call that ends before its answer is whole is made again", async (t) => {
  const server = await start(t);
  let calls = 0;
  const url = await answering(t, (request, response) => {
    if (request.url === "/health") response.end();
    else if ((calls += 1) === 1) response.writeHead(200, { "content-length": 1_000 }).write("{", () => response.destroy());
    else response.end('{"decision": {"action": "ACTION_TRADE", "action_of_tomorrow": 1}}');
  });
  const client = await connect(t, [url, server.url]);
  assert.equal((await client.decide(order)).trades, true);
});

test("a proxy's own answers have a status, and what is no server of ours is named", async (t) => {
  let answer = [502, "<html>"];
  const url = await answering(t, (_, response) => response.writeHead(answer[0]).end(answer[1]));
  const client = await connect(t, url);
  for (const [status, text, wanted] of [
    [502, "<html>", "UNAVAILABLE"],
    [403, "", "PERMISSION_DENIED"],
    [404, "[]", "UNIMPLEMENTED"],
    [418, "null", "UNKNOWN"],
    [200, "<html>", "UNKNOWN"],
    [200, "{}", "INTERNAL"],
  ]) {
    answer = [status, text];
    await assert.rejects(client.decide(order, { timeoutMs: 1_000 }), (error) => {
      assert.ok(error instanceof PretradeError);
      assert.equal(error.status, wanted, `${status} ${text}`);
      return true;
    });
  }
});

test("a token is asked for every call, and travels over no network in the open", async (t) => {
  const server = await start(t);
  const tokens = ["first", "second"];
  const client = await connect(t, server.url, { token: async () => tokens.shift() ?? Promise.reject(new Error("gone")) });
  await client.decide(order);
  await client.decide(order);
  assert.deepEqual(server.headers.map(({ authorization }) => authorization), ["Bearer first", "Bearer second"]);
  await assert.rejects(client.decide(order), { status: "UNAUTHENTICATED", reason: "TOKEN", field: "token" });
  await assert.rejects(Client.connect("http://192.0.2.1:7004", { token: "mine" }), { reason: "TOKEN_IN_THE_OPEN" });
});

for (const address of ["127.0.0.1:7004", "ftp://127.0.0.1", "/relative", "http://u:p@127.0.0.1", "http://127.0.0.1/?a=1"]) {
  test(`${address} is no address of a server`, async () => {
    await assert.rejects(Client.connect(address), { status: "INVALID_ARGUMENT", reason: "INVALID_SERVER" });
  });
}

test("an address may have a path, behind which a proxy passes calls on", async (t) => {
  const paths = [];
  const url = await answering(t, (request, response) => {
    paths.push(request.url);
    response.end('{"decision": {"action": "ACTION_NO_TRADE"}}');
  });
  const client = await connect(t, `${url}/pretrade/`);
  assert.equal((await client.decide(order)).action, "NO_TRADE");
  assert.deepEqual(paths, ["/pretrade/health", "/pretrade/v1/decide"]);
});

test("a server that cannot be reached is waited for, and in the end the error names it", async (t) => {
  const server = await start(t);
  const { url } = server;
  await server.stop();
  const connecting = connect(t, url, { connectMs: 20_000 });
  await server.restart();
  const client = await connecting;
  await server.stop();
  await assert.rejects(client.decide(order, { timeoutMs: 1_000 }), { status: "UNAVAILABLE", server: url });
  await assert.rejects(Client.connect(url, { connectMs: 200 }), { status: "UNAVAILABLE", server: url });
  await assert.rejects(Client.connect([]), { reason: "MISSING_SERVER" });
});
