/** A server by gRPC, on `@grpc/grpc-js`. */

import { create, fromBinary, type DescMessage, type MessageShape, toBinary } from "@bufbuild/protobuf";
import {
  Client as Channel,
  type ClientDuplexStream,
  connectivityState,
  Metadata,
  type ServiceError,
  status as codes,
} from "@grpc/grpc-js";

import type { Attempt, Connection, Health } from "./connection.js";
import { authorization, channelCredentials, type Credentials, isLocal } from "./credentials.js";
import { type ErrorFacts, PretradeError } from "./errors.js";
import {
  type DecideBatchRequest,
  type DecideBatchResponse,
  type DecideRequest,
  type DecideResponse,
  DecisionService,
  type DecideStreamRequest,
  type DecideStreamResponse,
} from "./gen/pretrade/decision/v1/decision_pb.js";
import { ErrorInfoSchema, StatusSchema } from "./gen/pretrade/wire/rpc/status_pb.js";
import { statusOf } from "./status.js";

/** How a channel looks for a server that it has lost, and notices that it has lost it. */
const LOST = {
  // A server that listens again is found within 0.12 s, not after gRPC's default of up to two minutes.
  "grpc.initial_reconnect_backoff_ms": 50,
  "grpc.max_reconnect_backoff_ms": 100,
  // A server that was replaced may have another address: it is looked up again as soon.
  "grpc.dns_min_time_between_resolutions_ms": 300,
  // A connection that swallows everything stays open for many minutes without these. A server of ours closes
  // connections that are pinged more often than every 10 s.
  "grpc.keepalive_time_ms": 12_000,
  "grpc.keepalive_timeout_ms": 3_000,
};
const METHODS = DecisionService.method;
const HEALTH = "/grpc.health.v1.Health/Check";
/** The few bytes of a `HealthCheckResponse`, in hexadecimal, which is all that we need of that service's messages. */
const HEALTHS: Readonly<Record<string, Health>> = { "0801": "SERVING", "0802": "NOT_SERVING" };

export type DecideStreamCall = ClientDuplexStream<DecideStreamRequest, DecideStreamResponse>;

/** One server, by gRPC. */
export class GrpcConnection implements Connection {
  readonly #channel: Channel;
  #isClosed = false;

  /**
   * @param server - `host:port`.
   * @throws PretradeError - The credentials cannot be used with it.
   */
  constructor(
    readonly server: string,
    private readonly credentials: Credentials,
  ) {
    this.#channel = new Channel(server, channelCredentials(credentials, server), {
      ...LOST,
      "grpc.enable_retries": 0, // retries.ts does that: theirs would multiply
      "grpc.enable_http_proxy": isLocal(server) ? 0 : 1, // a proxy's 127.0.0.1 is another machine
      ...(credentials.tlsName ? { "grpc.ssl_target_name_override": credentials.tlsName } : {}),
    });
  }

  decide(request: DecideRequest, attempt: Attempt): Promise<DecideResponse> {
    return this.#unary(METHODS.decide, request, attempt);
  }

  decideBatch(request: DecideBatchRequest, attempt: Attempt): Promise<DecideBatchResponse> {
    return this.#unary(METHODS.decideBatch, request, attempt);
  }

  /** Opens a stream, which has no deadline: its orders have. */
  decideStream(headers: Attempt["headers"], waitsForConnection: boolean): DecideStreamCall {
    const { input, output } = METHODS.decideStream;
    return this.#channel.makeBidiStreamRequest(
      pathOf(METHODS.decideStream),
      (request: DecideStreamRequest) => packed(input, request),
      (bytes) => fromBinary(output, bytes),
      this.#metadata(headers, waitsForConnection),
    );
  }

  health(withinMs: number): Promise<Health> {
    return new Promise<Health>((resolve) => {
      const same = (bytes: Buffer) => bytes;
      const options = { deadline: Date.now() + withinMs };
      const metadata = this.#metadata({}, false);
      this.#channel.makeUnaryRequest(HEALTH, same, same, Buffer.alloc(0), metadata, options, (error, answer) => {
        if (error) {
          // A server that knows no such service is there all the same.
          resolve(error.code === codes.UNIMPLEMENTED ? "SERVING" : "UNREACHABLE");
        } else {
          resolve(HEALTHS[(answer as Buffer).toString("hex")] ?? "UNKNOWN");
        }
      });
    }).catch(() => "UNREACHABLE"); // for example without a token, whose file is gone
  }

  /**
   * Waits until there is a connection.
   *
   * @throws PretradeError - There is none in time.
   */
  ready(withinMs: number): Promise<void> {
    const { server } = this;
    const until = Date.now() + withinMs;
    const channel = this.#channel.getChannel();
    return new Promise((resolve, reject) => {
      const look = (late?: Error) => {
        // A closed channel that is asked for its state connects again, as it does in gRPC's own waitForReady.
        if (late || this.#isClosed) {
          reject(new PretradeError("UNAVAILABLE", `there was no connection within ${withinMs} ms`, { server }));
          return;
        }
        const state = channel.getConnectivityState(true);
        if (state === connectivityState.READY) {
          resolve();
        } else {
          channel.watchConnectivityState(state, until, look);
        }
      };
      look();
    });
  }

  close(): void {
    this.#isClosed = true;
    this.#channel.close();
  }

  /** What went wrong with a call. */
  errorOf(error: ServiceError): PretradeError {
    return new PretradeError(statusOf(error.code), error.details, { ...factsOf(error), server: this.server });
  }

  #unary<I extends DescMessage, O extends DescMessage>(
    method: { input: I; output: O; name: string; parent: { typeName: string } },
    request: MessageShape<I>,
    attempt: Attempt,
  ): Promise<MessageShape<O>> {
    return new Promise((resolve, reject) => {
      const call = this.#channel.makeUnaryRequest(
        pathOf(method),
        (message: MessageShape<I>) => packed(method.input, message),
        (bytes) => fromBinary(method.output, bytes),
        request,
        this.#metadata(attempt.headers, attempt.waitsForConnection),
        { deadline: Date.now() + attempt.leftMs },
        (error, answer) => {
          attempt.signal?.removeEventListener("abort", cancel);
          error ? reject(this.errorOf(error)) : resolve(answer as MessageShape<O>);
        },
      );
      const cancel = () => call.cancel();
      attempt.signal?.addEventListener("abort", cancel);
    });
  }

  #metadata(headers: Attempt["headers"], waitForReady: boolean): Metadata {
    const metadata = new Metadata({ waitForReady });
    const shown = authorization(this.credentials);
    if (shown !== undefined) {
      metadata.set("authorization", shown);
    }
    for (const [name, value] of Object.entries(headers)) {
      metadata.set(name, value);
    }
    return metadata;
  }
}

/** The name of a method on the wire. */
function pathOf(method: { name: string; parent: { typeName: string } }): string {
  return `/${method.parent.typeName}/${method.name}`;
}

function packed<D extends DescMessage>(schema: D, message: MessageShape<D>): Buffer {
  return Buffer.from(toBinary(schema, message));
}

/** What the trailers of a call say of its error. */
function factsOf({ metadata }: ServiceError): ErrorFacts {
  const [packedStatus] = metadata.get("grpc-status-details-bin");
  const { details } = packedStatus ? fromBinary(StatusSchema, packedStatus as Buffer) : create(StatusSchema);
  const packedInfo = details.find(({ typeUrl }) => typeUrl.endsWith("/google.rpc.ErrorInfo"));
  const info = packedInfo && fromBinary(ErrorInfoSchema, packedInfo.value);
  const [pushback] = metadata.get("grpc-retry-pushback-ms");
  const retryAfterMs = pushback === undefined ? undefined : delayOf(`${pushback}`);
  return { reason: info?.reason, field: info?.metadata["field"], retryAfterMs };
}

/** What is no number means never, as to gRPC itself. */
function delayOf(pushback: string): number {
  return /^\d+$/.test(pushback) ? Number(pushback) : Infinity;
}
