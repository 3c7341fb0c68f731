// What a caller hears for every status of gRPC, in every way to ask.
import assert from "node:assert/strict";
import { test } from "node:test";

import { PretradeError } from "pretrade";

import { asking, nameOf, order, start, WAYS } from "./ways.js";

const STATUSES = [
  "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
  "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE",
  "DATA_LOSS", "UNAUTHENTICATED",
];
const ASKED_AGAIN = ["CANCELLED", "UNAVAILABLE"];

for (const way of Object.keys(WAYS)) {
  for (const status of STATUSES) {
    test(`${status} is told as it was said, by ${way}`, async (t) => {
      const server = await start(t);
      server.fail(status, { message: "too bad.", reason: "SOME_REASON", field: "quantity", times: 1_000 });
      const isAskedAgain = ASKED_AGAIN.includes(status);
      // One that is asked again ends with the deadline.
      const ask = await asking(t, way, [server], isAskedAgain ? { timeoutMs: 1_000 } : {});
      await assert.rejects(ask(order), (error) => {
        assert.ok(error instanceof PretradeError);
        if (way.startsWith("shared") && isAskedAgain && error.status === "DEADLINE_EXCEEDED") {
          return true; // on a busy machine the caller's deadline passed before the call that it shared had failed
        }
        assert.deepEqual([error.status, error.reason, error.field], [status, "SOME_REASON", "quantity"]);
        assert.equal(error.retryAfterMs, undefined);
        assert.ok(error.message.startsWith(`${nameOf(way, server)} answered ${status} (SOME_REASON): too bad.`), error.message);
        return true;
      });
      const asked = server.headers.length;
      assert.ok(isAskedAgain ? asked > 1 : asked === 1, `${asked} attempts`);
    });
  }

  test(`an order that breaks a rule says which, by ${way}`, async (t) => {
    const ask = await asking(t, way, [await start(t)]);
    const refusal = { status: "INVALID_ARGUMENT", reason: "INVALID_QUANTITY", field: "quantity" };
    await assert.rejects(ask({ ...order, quantity: 0 }), refusal);
  });

  test(`a refusal is waited for as long as it says, and not if it says never or nothing, by ${way}`, async (t) => {
    const server = await start(t);
    const ask = await asking(t, way, [server]);
    server.fail("RESOURCE_EXHAUSTED", { retryAfterMs: 1, times: 6 });
    assert.equal((await ask(order)).trades, true);
    for (const said of [{}, { retryAfterMs: Infinity }, { retryAfterMs: 60_000 }]) {
      const asked = server.headers.length;
      server.fail("RESOURCE_EXHAUSTED", said);
      await assert.rejects(ask(order), { status: "RESOURCE_EXHAUSTED" });
      assert.equal(server.headers.length, asked + 1);
    }
  });
}
