// A server that answers as a test says: real, by gRPC, on loopback.
import { fromBinary, create, toBinary } from "@bufbuild/protobuf";
import grpc from "@grpc/grpc-js";
import { Action, DecisionService } from "pretrade/contract";

export const order = { instrument: "BTCUSDT.SIM", side: "buy", quantity: 1, strategy: "test" };

/** A decision for an order: TRADE. */
export const decided = ({ orderRef }) => ({ decisionId: "an-id", orderRef, action: Action.TRADE });

/** How a call ends that is refused. */
export function refusal(code, { pushbackMs, details = "full" } = {}) {
  const metadata = new grpc.Metadata();
  if (pushbackMs !== undefined) metadata.set("grpc-retry-pushback-ms", `${pushbackMs}`);
  return { code: grpc.status[code], details, metadata };
}

const methods = Object.fromEntries(
  DecisionService.methods.map((method) => [
    method.name,
    {
      path: `/${DecisionService.typeName}/${method.name}`,
      requestStream: method.methodKind === "bidi_streaming",
      responseStream: method.methodKind === "bidi_streaming",
      requestSerialize: (message) => Buffer.from(toBinary(method.input, message)),
      requestDeserialize: (bytes) => fromBinary(method.input, bytes),
      responseSerialize: (message) => Buffer.from(toBinary(method.output, create(method.output, message))),
      responseDeserialize: (bytes) => fromBinary(method.output, bytes),
    },
  ]),
);
const health = {
  Check: {
    path: "/grpc.health.v1.Health/Check",
    requestStream: false,
    responseStream: false,
    requestDeserialize: (bytes) => bytes,
    responseSerialize: (bytes) => bytes,
  },
};

/**
 * Runs a server until the test ends.
 *
 * @param answers - `decide(request, number, call)` and `decideBatch(…)` give an answer or a refusal,
 * `stream(call, number)` does what it likes; a number says how many calls came before.
 * @returns Among others `stop()`, which ends it at once, and `hush(true)`: it answers nothing, not even for its health.
 */
export async function serve(t, { decide, decideBatch, stream, port = 0 }) {
  let isSilent = false;
  const calls = [];
  const unary = (answer) => (call, callback) => {
    calls.push(call);
    if (isSilent) return;
    const said = answer(call.request, calls.length - 1, call);
    said.code === undefined ? callback(null, said) : callback(said);
  };
  const server = new grpc.Server();
  server.addService(methods, {
    Decide: unary(decide ?? (({ order }) => ({ decision: decided(order) }))),
    DecideBatch: unary(decideBatch),
    DecideStream: (call) => {
      calls.push(call);
      call.on("error", () => {}); // a caller that leaves
      stream(call, calls.length - 1);
    },
  });
  server.addService(health, { Check: (_, callback) => isSilent || callback(null, Buffer.from([0x08, 0x01])) });
  const bound = await new Promise((resolve, reject) => {
    const insecure = grpc.ServerCredentials.createInsecure();
    server.bindAsync(`127.0.0.1:${port}`, insecure, (error, found) => (error ? reject(error) : resolve(found)));
  });
  t.after(() => server.forceShutdown());
  const stop = () => server.forceShutdown();
  const hush = (silent) => (isSilent = silent);
  return { address: `127.0.0.1:${bound}`, port: bound, calls, stop, hush };
}
