// Asks for one decision after another until its standard input ends: node keep_asking.js CALLERS SERVER... The callers
// take turns in making calls, sharing calls, asking for batches, and sharing a stream, which is by gRPC alone: where the
// servers are URLs, all is by HTTP. Prints a line when every caller has had an answer, and then what they heard: by which
// server, and what failed.
import { Client } from "pretrade";
import { Client as WebClient } from "pretrade/web";

const [callers, ...servers] = process.argv.slice(2);
const isWeb = servers[0].startsWith("http");
const client = await (isWeb ? WebClient : Client).connect(servers, { timeoutMs: 20_000 });
const stream = isWeb ? undefined : client.stream();
const batches = {
  async decide(order) {
    const pair = [order, { ...order, orderRef: `${order.orderRef}-b` }];
    const [first, second] = await client.decideBatch(pair);
    if (first.error ?? second.error) throw first.error ?? second.error;
    note(second.decision);
    return first.decision;
  },
};
const ways = [client, client.shared(), batches, ...(stream ? [stream] : [])];
const heard = [];
const failed = [];
const answered = new Set();
let isEnding = false;
process.stdin.on("end", () => (isEnding = true)).resume();

function note({ orderRef, decisionId, server }) {
  heard.push([orderRef, decisionId, server]);
}

async function ask(caller) {
  const name = `${isWeb ? "web" : "node"}-${caller}`;
  for (let call = 0; !isEnding; call += 1) {
    const orderRef = `${name}-${call}`;
    const order = { orderRef, instrument: "BTCUSDT.SIM", side: "buy", quantity: 1, strategy: name };
    try {
      note(await ways[caller % ways.length].decide(order));
      if (answered.size < answered.add(caller).size && answered.size === Number(callers)) {
        console.log(JSON.stringify("asking"));
      }
    } catch (error) {
      failed.push(`${orderRef}: ${error.message}`);
    }
  }
}

await Promise.all(Array.from({ length: Number(callers) }, (_, caller) => ask(caller)));
await stream?.close();
client.close();
console.log(JSON.stringify({ heard, failed }));
