// What a page of a site does: asks a real server through "pretrade/web", in every way there is, and tells the page's own
// server what came back. tests/integration/test_js_client.py opens it in a browser, as /?server=URL.
import { Client, PretradeError } from "pretrade/web";

const server = new URL(location.href).searchParams.get("server");
const order = (orderRef, changes) => ({
  orderRef, instrument: "BTCUSDT.SIM", side: "buy", quantity: 1, strategy: "test", ...changes,
});
const facts = (error) => {
  const { status, reason, field } = error;
  return { status, reason, field, isOurs: error instanceof PretradeError };
};

async function ask() {
  const client = await Client.connect(server, { timeoutMs: 20_000, connectMs: 3_000 });
  const traceparent = `00-${"1".repeat(32)}-${"2".repeat(16)}-01`;
  const decided = await client.decide(order("one"), { explain: true, headers: { traceparent } });
  const keyed = order("keyed", { idempotencyKey: crypto.randomUUID() });
  const [first, again] = [await client.decide(keyed), await client.decide(keyed)];
  const refused = await client.decide(order("two", { instrument: "NO.SUCH" })).catch(facts);
  const results = await client.decideBatch([order("a"), order("b", { quantity: -1 }), order("c")]);
  const shared = client.shared();
  const refs = Array.from({ length: 100 }, (_, number) => `${number}`);
  const together = await Promise.all(refs.map((ref) => shared.decide(order(ref, { reduceOnly: true }))));
  const several = await Client.connect(["http://127.0.0.1:9", server], { timeoutMs: 20_000 }); // nobody is at the first
  const failedOver = await several.decide(order("elsewhere"));
  several.close();
  client.close();
  return {
    decided: [decided.orderRef, decided.action, decided.trades, decided.reasons, decided.explanation.message],
    isSame: first.decisionId === again.decisionId,
    refused,
    batch: results.map(({ orderRef, decision, error }) => [orderRef, decision?.action ?? error.reason]),
    shared: together.map((decision) => decision.orderRef),
    failedOver: failedOver.orderRef,
    closed: await client.decide(order("late")).catch(facts),
  };
}

await fetch("/said", { method: "POST", body: JSON.stringify(await ask().catch(facts)) });
