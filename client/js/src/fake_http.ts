/** The port of a `FakeServer` for JSON over HTTP. */

import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { text } from "node:stream/consumers";

import { type DescMessage, fromJsonString, type MessageShape, toJsonString } from "@bufbuild/protobuf";

import { invalid, PretradeError } from "./errors.js";
import { asError, type FakeCalls } from "./fake_calls.js";
import {
  DecideBatchRequestSchema,
  DecideBatchResponseSchema,
  DecideRequestSchema,
  DecideResponseSchema,
} from "./gen/pretrade/decision/v1/decision_pb.js";
import type { Status } from "./status.js";

/** What a server answers pages of a site that it allows. A fake one allows all. */
const CORS = {
  "access-control-allow-origin": "*",
  "access-control-allow-methods": "GET, POST",
  "access-control-allow-headers":
    "authorization, content-type, grpc-timeout, last-event-id, pretrade-reduce-only, traceparent, tracestate, x-correlation-id",
};
/** Source: https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto. */
const HTTP: Readonly<Record<Status, number>> = {
  OK: 200,
  CANCELLED: 499,
  UNKNOWN: 500,
  INVALID_ARGUMENT: 400,
  DEADLINE_EXCEEDED: 504,
  NOT_FOUND: 404,
  ALREADY_EXISTS: 409,
  PERMISSION_DENIED: 403,
  RESOURCE_EXHAUSTED: 429,
  FAILED_PRECONDITION: 400,
  ABORTED: 409,
  OUT_OF_RANGE: 400,
  UNIMPLEMENTED: 404,
  INTERNAL: 500,
  UNAVAILABLE: 503,
  DATA_LOSS: 500,
  UNAUTHENTICATED: 401,
};

/** Answers JSON over HTTP on loopback. */
export class FakeHttpPort {
  #server: Server | undefined;

  constructor(
    private readonly fake: FakeCalls,
    public port: number,
  ) {}

  async start(): Promise<void> {
    const server = createServer((request, response) => void this.#serve(request, response));
    await new Promise<void>((resolve, reject) => server.once("error", reject).listen(this.port, "127.0.0.1", resolve));
    this.port = (server.address() as AddressInfo).port;
    this.#server = server;
  }

  async stop(): Promise<void> {
    const server = this.#server;
    this.#server = undefined;
    if (server) {
      const closed = new Promise((resolve) => server.close(resolve));
      server.closeAllConnections();
      await closed;
    }
  }

  async #serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const answer = (status: number, body = "", type = "application/json") => {
      response.writeHead(status, { ...CORS, ...(body ? { "content-type": type } : {}) }).end(body);
    };
    try {
      if (request.method === "OPTIONS") {
        answer(204);
      } else if (request.url === "/health") {
        await this.fake.runs();
        const status = this.fake.isHealthy ? "SERVING" : "NOT_SERVING";
        answer(this.fake.isHealthy ? 200 : 503, JSON.stringify({ status }));
      } else {
        answer(200, await this.#called(request));
      }
    } catch (error) {
      const { http, body } = problem(asError(error));
      answer(http, body, "application/problem+json");
    }
  }

  async #called(request: IncomingMessage): Promise<string> {
    const body = await text(request);
    const headers = Object.entries(request.headers).map(([name, value]) => [name, `${value}`]);
    await this.fake.begin(Object.fromEntries(headers));
    if (request.method === "POST" && request.url === "/v1/decide") {
      return packed(DecideResponseSchema, this.fake.decide(unpacked(DecideRequestSchema, body)));
    }
    if (request.method === "POST" && request.url === "/v1/decide:batch") {
      return packed(DecideBatchResponseSchema, this.fake.decideBatch(unpacked(DecideBatchRequestSchema, body)));
    }
    throw new PretradeError("UNIMPLEMENTED", "nothing is at this path", { reason: "UNKNOWN_METHOD" });
  }
}

/** The contract's own names, as a server writes them. */
function packed<D extends DescMessage>(schema: D, message: MessageShape<D>): string {
  return toJsonString(schema, message, { useProtoFieldName: true });
}

function unpacked<D extends DescMessage>(schema: D, body: string): MessageShape<D> {
  try {
    return fromJsonString(schema, body);
  } catch (error) {
    throw invalid("MALFORMED_REQUEST", "", (error as Error).message);
  }
}

function problem({ status, words, reason, field, retryAfterMs }: PretradeError): { http: number; body: string } {
  const http = HTTP[status];
  const said = {
    type: `urn:pretrade:reason:${reason ?? status}`,
    title: status,
    status: http,
    detail: words,
    code: status,
    reason,
    field: field || undefined,
    retry_after_seconds: retryAfterMs === undefined || retryAfterMs === Infinity ? undefined : retryAfterMs / 1_000,
  };
  return { http, body: JSON.stringify(said) };
}
