/** The port of a `FakeServer` for gRPC. */

import { create, type DescMessage, fromBinary, type MessageShape, toBinary } from "@bufbuild/protobuf";
import { anyPack } from "@bufbuild/protobuf/wkt";
import {
  Metadata,
  type sendUnaryData,
  Server,
  ServerCredentials,
  type ServerDuplexStream,
  type ServerUnaryCall,
} from "@grpc/grpc-js";

import type { PretradeError } from "./errors.js";
import { asError, type FakeCalls, type Headers } from "./fake_calls.js";
import {
  type DecideBatchRequest,
  type DecideRequest,
  DecideStreamResponseSchema,
  type DecideStreamRequest,
  type DecideStreamResponse,
  DecisionService,
  OrderSchema,
} from "./gen/pretrade/decision/v1/decision_pb.js";
import { ErrorInfoSchema, StatusSchema } from "./gen/pretrade/wire/rpc/status_pb.js";
import { codeOf } from "./status.js";

const [SERVING, NOT_SERVING] = [Buffer.from([0x08, 0x01]), Buffer.from([0x08, 0x02])];
const HEALTH = {
  Check: {
    path: "/grpc.health.v1.Health/Check",
    requestStream: false,
    responseStream: false,
    requestSerialize: (bytes: Buffer) => bytes,
    requestDeserialize: (bytes: Buffer) => bytes,
    responseSerialize: (bytes: Buffer) => bytes,
    responseDeserialize: (bytes: Buffer) => bytes,
  },
};
const METHODS = Object.fromEntries(
  DecisionService.methods.map(({ name, methodKind, input, output }) => [
    name,
    {
      path: `/${DecisionService.typeName}/${name}`,
      requestStream: methodKind === "bidi_streaming",
      responseStream: methodKind === "bidi_streaming",
      ...codec("request", input),
      ...codec("response", output),
    },
  ]),
) as never; // their names are the contract's

/** Answers gRPC on loopback. */
export class FakeGrpcPort {
  #server: Server | undefined;

  constructor(
    private readonly fake: FakeCalls,
    public port: number,
  ) {}

  async start(): Promise<void> {
    const server = new Server();
    server.addService(METHODS, {
      Decide: this.#unary((request: DecideRequest) => this.fake.decide(request)),
      DecideBatch: this.#unary((request: DecideBatchRequest) => this.fake.decideBatch(request)),
      DecideStream: (call: ServerDuplexStream<DecideStreamRequest, DecideStreamResponse>) => void this.#stream(call),
    });
    server.addService(HEALTH, {
      Check: (_: unknown, callback: sendUnaryData<Buffer>) =>
        void this.fake.runs().then(() => callback(null, this.fake.isHealthy ? SERVING : NOT_SERVING)),
    });
    this.port = await new Promise<number>((resolve, reject) =>
      server.bindAsync(`127.0.0.1:${this.port}`, ServerCredentials.createInsecure(), (error, port) =>
        error ? reject(error) : resolve(port),
      ),
    );
    this.#server = server;
  }

  async stop(): Promise<void> {
    this.#server?.forceShutdown();
    this.#server = undefined;
  }

  #unary<I, O>(answer: (request: I) => O) {
    return async (call: ServerUnaryCall<I, O>, callback: sendUnaryData<O>) => {
      try {
        await this.fake.begin(headersOf(call.metadata));
        callback(null, answer(call.request));
      } catch (error) {
        callback(refusal(asError(error)));
      }
    };
  }

  async #stream(call: ServerDuplexStream<DecideStreamRequest, DecideStreamResponse>): Promise<void> {
    call.on("error", () => {}); // a caller that leaves
    try {
      // By itself the loop would destroy the call when it is left, and nobody would hear why.
      for await (const { order } of call.iterator({ destroyOnReturn: false }) as AsyncIterable<DecideStreamRequest>) {
        await this.fake.begin(headersOf(call.metadata));
        call.write(create(DecideStreamResponseSchema, { result: this.fake.result(order ?? create(OrderSchema)) }));
      }
      call.end();
    } catch (error) {
      call.emit("error", refusal(asError(error)));
    }
  }
}

/** How a call ends that fails: with a reason in its details, and when to ask again in its metadata. */
function refusal({ status, words, reason, field, retryAfterMs }: PretradeError) {
  const metadata = new Metadata();
  if (reason) {
    const info = create(ErrorInfoSchema, { reason, domain: "pretrade", metadata: field ? { field } : {} });
    // The type's name is Google's; the message is the same.
    const packed = { ...anyPack(ErrorInfoSchema, info), typeUrl: "type.googleapis.com/google.rpc.ErrorInfo" };
    const said = create(StatusSchema, { code: codeOf(status), message: words, details: [packed] });
    metadata.set("grpc-status-details-bin", Buffer.from(toBinary(StatusSchema, said)));
  }
  if (retryAfterMs !== undefined) {
    metadata.set("grpc-retry-pushback-ms", retryAfterMs === Infinity ? "-1" : `${Math.ceil(retryAfterMs)}`);
  }
  return { code: codeOf(status), details: words, metadata };
}

function headersOf(metadata: Metadata): Headers {
  return Object.fromEntries(Object.entries(metadata.getMap()).map(([name, value]) => [name, `${value}`]));
}

function codec<K extends string, D extends DescMessage>(of: K, schema: D) {
  return {
    [`${of}Serialize`]: (message: MessageShape<D>) => Buffer.from(toBinary(schema, message)),
    [`${of}Deserialize`]: (bytes: Buffer) => fromBinary(schema, bytes),
  };
}
