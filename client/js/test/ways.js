// The seven ways in which callers in JavaScript ask, as one function: an order in, a decision out.
import { Client as NodeClient } from "pretrade";
import { FakeServer } from "pretrade/testing";
import { Client as WebClient } from "pretrade/web";

export const order = { instrument: "BTCUSDT.SIM", side: "buy", quantity: 1, strategy: "test" };
/** Deadline of calls that say no other: for what ends much sooner, on a machine that has other work. */
export const ROOMY_MS = 20_000;

const batched = (client) => async (asked, options) => {
  const [{ decision, error }] = await client.decideBatch([asked], options);
  if (error) throw error;
  return decision;
};
const byCalls = (asker) => (asked, options) => asker.decide(asked, options);

export const STREAM = "a stream";
export const WAYS = {
  calls: [NodeClient, byCalls],
  batches: [NodeClient, batched],
  "shared calls": [NodeClient, (client) => byCalls(client.shared())],
  [STREAM]: [NodeClient, (client) => byCalls(client.stream())],
  "calls over HTTP": [WebClient, byCalls],
  "batches over HTTP": [WebClient, batched],
  "shared calls over HTTP": [WebClient, (client) => byCalls(client.shared())],
};

/** A fake server, which is stopped when the test ends. */
export async function start(t, options) {
  const server = await FakeServer.start(options);
  t.after(() => {
    server.resume();
    return server.stop();
  });
  return server;
}

/** Connects in one of `WAYS` to fake servers; what is given takes what `decide` takes. */
export async function asking(t, way, servers, options = {}) {
  const [Client, asked] = WAYS[way];
  const addresses = servers.map(({ address, url }) => (Client === WebClient ? url : address));
  const client = await Client.connect(addresses, { timeoutMs: ROOMY_MS, ...options });
  t.after(() => client.close());
  return asked(client);
}

/** The name of a server as a client of this way knows it. */
export function nameOf(way, { address, url }) {
  return WAYS[way][0] === WebClient ? url : address;
}
