// Calls every way of a real server once and prints what came back as one JSON object: node every_method.js HOST:PORT.
// tests/contract/test_edges.py starts the server, and says what has to come back.
import { Client } from "pretrade";

const client = await Client.connect(process.argv[2], { timeoutMs: 10_000 });
const order = (orderRef, changes) => ({
  orderRef, instrument: "BTCUSDT.SIM", side: "buy", quantity: 1, strategy: "test", ...changes,
});
const facts = ({ status, reason, field }) => ({ status, reason, field });

const decided = await client.decide(order("one"), { explain: true });
const refused = await client.decide(order("two", { instrument: "NO.SUCH" })).catch(facts);
const results = await client.decideBatch([order("a"), order("b", { quantity: -1 }), order("c")]);
const stream = client.stream();
const refs = Array.from({ length: 10 }, (_, number) => `s${number}`);
const streamed = await Promise.all(refs.map((ref) => stream.decide(order(ref))));
const refusedInStream = await stream.decide(order("t", { quantity: -1 })).catch(facts);
await stream.close();
client.close();
console.log(JSON.stringify({
  decided: [decided.orderRef, decided.action, decided.trades, decided.reasons, decided.explanation.message],
  refused,
  batch: results.map(({ orderRef, decision, error }) => [orderRef, decision?.action ?? error.reason]),
  streamed: streamed.map((decision) => decision.orderRef),
  refusedInStream,
}));
