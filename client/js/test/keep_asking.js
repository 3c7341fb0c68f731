// Asks for one decision after another, from several callers and over a stream that they share, until its standard input
// ends: node keep_asking.js CALLERS HOST:PORT... Prints a line when the first has been answered, and then what it heard.
import { Client } from "pretrade";

const [callers, ...servers] = process.argv.slice(2);
const client = await Client.connect(servers, { timeoutMs: 20_000 });
const stream = client.stream();
const heard = [];
const failed = [];
let isEnding = false;
process.stdin.on("end", () => (isEnding = true)).resume();

async function ask(caller) {
  const decide = caller % 2 ? client : stream;
  for (let call = 0; !isEnding; call += 1) {
    const orderRef = `js-${caller}-${call}`;
    const order = { orderRef, instrument: "BTCUSDT.SIM", side: "buy", quantity: 1, strategy: `js-${caller}` };
    try {
      const { decisionId } = await decide.decide(order);
      if (heard.push([orderRef, decisionId]) === 1) console.log(JSON.stringify("asking"));
    } catch (error) {
      failed.push(error.message);
    }
  }
}

await Promise.all(Array.from({ length: Number(callers) }, (_, caller) => ask(caller)));
await stream.close();
client.close();
console.log(JSON.stringify({ heard, failed }));
