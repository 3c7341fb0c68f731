/** A server by gRPC, on `@grpc/grpc-js`. */

import { create, fromBinary, type DescMessage, type MessageShape, toBinary } from "@bufbuild/protobuf";
import {
  Client as Channel,
  type ClientDuplexStream,
  connectivityState,
  Metadata,
  type ServiceError,
} from "@grpc/grpc-js";

import type { Attempt, Connection } from "./connection.js";
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

/**
 * How quickly a connection is made again. gRPC's own defaults need two seconds after an outage of three; a new look at
 * the names is wanted as soon, since a server that was replaced may have another address.
 */
const RECONNECT = {
  "grpc.initial_reconnect_backoff_ms": 50,
  "grpc.max_reconnect_backoff_ms": 300,
  "grpc.dns_min_time_between_resolutions_ms": 300,
};
const METHODS = DecisionService.method;
const HEALTH = "/grpc.health.v1.Health/Check";
/** `grpc.health.v1.HealthCheckResponse` with the status SERVING, as it is on the wire. */
const SERVING = Buffer.from([0x08, 0x01]);

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
      ...RECONNECT,
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
  decideStream(headers: Attempt["headers"]): DecideStreamCall {
    const { input, output } = METHODS.decideStream;
    return this.#channel.makeBidiStreamRequest(
      pathOf(METHODS.decideStream),
      (request: DecideStreamRequest) => packed(input, request),
      (bytes) => fromBinary(output, bytes),
      this.#metadata(headers),
    );
  }

  isServing(withinMs: number): Promise<boolean> {
    return new Promise<boolean>((resolve) => {
      const same = (bytes: Buffer) => bytes;
      const options = { deadline: Date.now() + withinMs };
      const metadata = this.#metadata({});
      this.#channel.makeUnaryRequest(HEALTH, same, same, Buffer.alloc(0), metadata, options, (error, answer) =>
        resolve(!error && SERVING.equals(answer as Buffer)),
      );
    }).catch(() => false); // for example without a token, whose file is gone
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
        this.#metadata(attempt.headers),
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

  #metadata(headers: Attempt["headers"]): Metadata {
    const metadata = new Metadata();
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
