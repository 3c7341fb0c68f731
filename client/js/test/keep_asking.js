// Asks for one decision after another until its standard input ends: node keep_asking.js CALLERS SERVER... By gRPC a third
// of the callers makes calls, a third shares them, and a third shares a stream; where the servers are URLs, by HTTP, half
// of them share calls. Prints a line when every caller has had an answer, and then what they heard.
import { Client } from "pretrade";
import { Client as WebClient } from "pretrade/web";

const [callers, ...servers] = process.argv.slice(2);
const isWeb = servers[0].startsWith("http");
const client = await (isWeb ? WebClient : Client).connect(servers, { timeoutMs: 20_000 });
const stream = isWeb ? undefined : client.stream();
const ways = [client, client.shared(), ...(stream ? [stream] : [])];
const heard = [];
const failed = [];
const answered = new Set();
let isEnding = false;
process.stdin.on("end", () => (isEnding = true)).resume();

async function ask(caller) {
  const name = `${isWeb ? "web" : "node"}-${caller}`;
  for (let call = 0; !isEnding; call += 1) {
    const orderRef = `${name}-${call}`;
    const order = { orderRef, instrument: "BTCUSDT.SIM", side: "buy", quantity: 1, strategy: name };
    try {
      const { decisionId } = await ways[caller % ways.length].decide(order);
      heard.push([orderRef, decisionId]);
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
