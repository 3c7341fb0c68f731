// What the client costs its callers, next to the raw stubs of grpc-js, and what shared calls and a stream gain:
// node costs.js HOST:PORT SECONDS ROUNDS. local/bench/client_js.py starts the echo server that is asked, and shows what
// this prints: for every way to ask, orders a second and microseconds of CPU an order, round by round.
//
// A caller with stubs builds the order's message and reads the decision's, as programs do. A caller with the library has
// keys, checked fields, retries and health besides. Every way is measured in turn, round after round; the round before
// the first counts for nothing, since nothing is compiled yet.
import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import grpc from "@grpc/grpc-js";
import { Client } from "pretrade";
import {
  Action,
  DecideBatchRequestSchema,
  DecideRequestSchema,
  DecideStreamRequestSchema,
  DecisionService,
  OrderSchema,
  Side,
} from "pretrade/contract";

const [address, seconds, rounds] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];
const TIMEOUT_MS = 5_000;
const MANY = 64;
const BATCH = 64;
const BATCH_CALLERS = 4;
const OWN_CONNECTION = { "grpc.use_local_subchannel_pool": 1 };

const fields = { instrument: "BTCUSDT.SIM", side: "buy", quantity: 0.05, strategy: "twap" };
const message = () => create(OrderSchema, { ...fields, side: Side.BUY });
const read = (decision) => decision.action === Action.TRADE && decision.score >= decision.threshold;
const readTyped = (decision) => decision.trades && decision.score >= decision.threshold;

const Stub = grpc.makeGenericClientConstructor(
  Object.fromEntries(
    DecisionService.methods.map(({ name, methodKind, input, output }) => [
      name,
      {
        path: `/${DecisionService.typeName}/${name}`,
        requestStream: methodKind === "bidi_streaming",
        responseStream: methodKind === "bidi_streaming",
        requestSerialize: (request) => Buffer.from(toBinary(input, request)),
        requestDeserialize: (bytes) => fromBinary(input, bytes),
        responseSerialize: (response) => Buffer.from(toBinary(output, response)),
        responseDeserialize: (bytes) => fromBinary(output, bytes),
      },
    ]),
  ),
);
const openStub = () => new Stub(address, grpc.credentials.createInsecure(), OWN_CONNECTION);
const called = (stub, name, request) =>
  new Promise((resolve, reject) =>
    stub[name](request, { deadline: Date.now() + TIMEOUT_MS }, (error, answer) =>
      error ? reject(error) : resolve(answer),
    ),
  );

/** Callers that ask one after another; `ask` gives how many orders were answered. */
async function measured(callers, ask) {
  await ask(); // connects
  const cpu = process.cpuUsage();
  const began = performance.now();
  const end = began + seconds * 1_000;
  let orders = 0;
  const call = async () => {
    while (performance.now() < end) {
      const answered = await ask();
      orders += answered; // in one go: `orders += await …` would count from before the wait
    }
  };
  await Promise.all(Array.from({ length: callers }, call));
  const { user, system } = process.cpuUsage(cpu);
  return [orders / ((performance.now() - began) / 1_000), (user + system) / orders];
}

async function stubs(callers) {
  const stub = openStub();
  const found = await measured(callers, async () => {
    read((await called(stub, "Decide", create(DecideRequestSchema, { order: message() }))).decision);
    return 1;
  });
  stub.close();
  return found;
}

async function stubsBatch(callers) {
  const stub = openStub();
  const found = await measured(callers, async () => {
    const orders = Array.from({ length: BATCH }, message);
    const { results } = await called(stub, "DecideBatch", create(DecideBatchRequestSchema, { orders }));
    for (const { outcome } of results) outcome.case === "decision" && read(outcome.value);
    return results.length;
  });
  stub.close();
  return found;
}

/** Matched by reference: the least that can be done. */
async function stubsStream(callers) {
  const stub = openStub();
  const stream = stub.DecideStream();
  const waiting = new Map();
  let count = 0;
  stream.on("data", ({ result }) => {
    waiting.get(result.orderRef)(result.outcome.value);
    waiting.delete(result.orderRef);
  });
  const found = await measured(callers, async () => {
    const order = message();
    order.orderRef = `${(count += 1)}`;
    const decision = new Promise((resolve) => waiting.set(order.orderRef, resolve));
    stream.write(create(DecideStreamRequestSchema, { order }));
    read(await decision);
    return 1;
  });
  const ended = new Promise((resolve) => stream.on("end", resolve));
  stream.end();
  await ended;
  stub.close();
  return found;
}

async function library(callers, asking = (client) => client) {
  const client = await Client.connect(address, { timeoutMs: TIMEOUT_MS });
  const asked = asking(client);
  const found = await measured(callers, async () => {
    readTyped(await asked.decide({ ...fields }));
    return 1;
  });
  await asked.close?.();
  client.close();
  return found;
}

async function libraryBatch(callers) {
  const client = await Client.connect(address, { timeoutMs: TIMEOUT_MS });
  const found = await measured(callers, async () => {
    const results = await client.decideBatch(Array.from({ length: BATCH }, () => ({ ...fields })));
    for (const { decision } of results) decision && readTyped(decision);
    return results.length;
  });
  client.close();
  return found;
}

/** The first of each kind of callers is what the others are compared with. */
const ways = [
  ["1 caller", "stubs", () => stubs(1)],
  ["1 caller", "library", () => library(1)],
  [`${MANY} callers`, "stubs", () => stubs(MANY)],
  [`${MANY} callers`, "library", () => library(MANY)],
  [`${MANY} callers`, "library, shared calls", () => library(MANY, (client) => client.shared())],
  [`${MANY} callers, a stream`, "stubs", () => stubsStream(MANY)],
  [`${MANY} callers, a stream`, "library", () => library(MANY, (client) => client.stream())],
  [`${BATCH_CALLERS} callers, batches of ${BATCH}`, "stubs", () => stubsBatch(BATCH_CALLERS)],
  [`${BATCH_CALLERS} callers, batches of ${BATCH}`, "library", () => libraryBatch(BATCH_CALLERS)],
].map(([callers, by, measure]) => ({ callers, by, measure, costs: [] }));

for (let round = -1; round < rounds; round += 1) {
  for (const { measure, costs } of ways) {
    const cost = await measure();
    if (round >= 0) costs.push(cost);
  }
}
console.log(JSON.stringify(ways.map(({ callers, by, costs }) => ({ callers, by, costs }))));
