// Asks for one decision with the credentials that the environment names: node ask_once.js HOST:PORT. Prints the action, or
// what went wrong.
import { Client, credentialsFromEnvironment } from "pretrade";

const order = { instrument: "BTCUSDT.SIM", side: "buy", quantity: 1, strategy: "test" };
const options = { ...credentialsFromEnvironment(), timeoutMs: 10_000 };
try {
  const client = await Client.connect(process.argv[2], options);
  const answer = await client.decide(order).catch((error) => error);
  client.close();
  console.log(JSON.stringify(answer.action ?? [answer.status, answer.reason ?? null]));
} catch (error) {
  console.log(JSON.stringify([error.status, error.reason ?? null]));
}
