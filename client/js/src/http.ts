/** A server by JSON over HTTP, with `fetch`: what browsers can do. */

import { type DescMessage, fromJsonString, type MessageShape, toJsonString } from "@bufbuild/protobuf";

import type { Attempt, Connection, Health } from "./connection.js";
import { invalid, PretradeError } from "./errors.js";
import {
  type DecideBatchRequest,
  type DecideBatchResponse,
  type DecideRequest,
  type DecideResponse,
  DecisionService,
} from "./gen/pretrade/decision/v1/decision_pb.js";
import { isThisMachine } from "./local.js";
import { after, pause } from "./pause.js";
import { isStatus, type Status } from "./status.js";

/** A caller's token, or what gives it. */
export type Token = string | (() => string | Promise<string>);

const { decide, decideBatch } = DecisionService.method;
const JSON_TYPE = "application/json";
/** The most that eight digits hold, which is what the header has room for. */
const MOST = 99_999_999;
/** How often a server that cannot be reached is looked for when a client connects. */
const LOOK_MS = 100;
/**
 * What an answer stands for that is no problem of the server's, but of a proxy before it.
 *
 * Source: https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md.
 */
const OF_PROXIES: Readonly<Record<number, Status>> = {
  400: "INTERNAL",
  401: "UNAUTHENTICATED",
  403: "PERMISSION_DENIED",
  404: "UNIMPLEMENTED",
  429: "UNAVAILABLE",
  502: "UNAVAILABLE",
  503: "UNAVAILABLE",
  504: "UNAVAILABLE",
};

/** One server, by JSON over HTTP. */
export class HttpConnection implements Connection {
  readonly server: string;
  #isClosed = false;

  /**
   * @param address - The URL of its HTTP port, or of what passes calls on to it.
   * @throws PretradeError - It is none, or the token would travel over a network in the open.
   */
  constructor(
    address: string,
    private readonly token: Token | undefined,
  ) {
    const url = urlOf(address);
    if (token !== undefined && url.protocol === "http:" && !isThisMachine(url.hostname)) {
      throw invalid("TOKEN_IN_THE_OPEN", "servers", `a token is not sent to ${address} without TLS: use https`);
    }
    this.server = `${url.origin}${url.pathname}`.replace(/\/+$/, "");
  }

  decide(request: DecideRequest, attempt: Attempt): Promise<DecideResponse> {
    return this.#post("/v1/decide", decide, request, attempt);
  }

  decideBatch(request: DecideBatchRequest, attempt: Attempt): Promise<DecideBatchResponse> {
    return this.#post("/v1/decide:batch", decideBatch, request, attempt);
  }

  async health(withinMs: number): Promise<Health> {
    try {
      const { ok, text } = await this.#health(withinMs);
      return ok ? "SERVING" : JSON.parse(text).status === "NOT_SERVING" ? "NOT_SERVING" : "UNKNOWN";
    } catch (error) {
      return error instanceof PretradeError ? "UNREACHABLE" : "UNKNOWN"; // a page of a proxy is no JSON
    }
  }

  async ready(withinMs: number): Promise<void> {
    const until = performance.now() + withinMs;
    for (;;) {
      try {
        await this.#health(Math.max(1, until - performance.now()));
        return;
      } catch (error) {
        if (this.#isClosed || performance.now() + LOOK_MS >= until) {
          throw error;
        }
      }
      await pause(LOOK_MS);
    }
  }

  close(): void {
    this.#isClosed = true;
  }

  #health(withinMs: number): Promise<Answer> {
    return this.#fetch("/health", { cache: "no-store" }, withinMs, undefined);
  }

  async #post<I extends DescMessage, O extends DescMessage>(
    path: string,
    method: { input: I; output: O },
    request: MessageShape<I>,
    attempt: Attempt,
  ): Promise<MessageShape<O>> {
    const { leftMs, signal } = attempt;
    const body = toJsonString(method.input, request);
    const headers = {
      ...attempt.headers,
      ...(await this.#authorization()),
      "content-type": JSON_TYPE,
      "grpc-timeout": timeoutHeader(leftMs),
    };
    const answer = await this.#fetch(path, { method: "POST", headers, body }, leftMs, signal);
    if (!answer.ok) {
      throw this.#problem(answer);
    }
    try {
      return fromJsonString(method.output, answer.text, { ignoreUnknownFields: true });
    } catch {
      const words = "it sent what is no answer of the contract: is this the HTTP port of a pretrade server?";
      throw new PretradeError("UNKNOWN", words, { server: this.server });
    }
  }

  /**
   * Asks, and hears the whole answer.
   *
   * @throws PretradeError - There was none in time, or none at all.
   */
  async #fetch(path: string, init: RequestInit, withinMs: number, signal: AbortSignal | undefined): Promise<Answer> {
    const { server } = this;
    const ending = new AbortController();
    const end = () => ending.abort();
    const timer = after(withinMs, end);
    signal?.addEventListener("abort", end);
    try {
      const response = await fetch(`${server}${path}`, { ...init, signal: ending.signal });
      return { ok: response.ok, status: response.status, text: await response.text() };
    } catch (error) {
      throw ending.signal.aborted
        ? new PretradeError("DEADLINE_EXCEEDED", "there was no answer before the deadline", { server })
        : new PretradeError("UNAVAILABLE", lost(error), { server });
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener("abort", end);
    }
  }

  async #authorization(): Promise<Record<string, string>> {
    if (this.token === undefined) {
      return {};
    }
    try {
      const token = typeof this.token === "string" ? this.token : await this.token();
      return { authorization: `Bearer ${token}` };
    } catch (error) {
      const words = `the token cannot be had: ${error instanceof Error ? error.message : String(error)}`;
      throw new PretradeError("UNAUTHENTICATED", words, { reason: "TOKEN", field: "token" });
    }
  }

  /** What went wrong with a call, by the problem in its answer (RFC 9457), or by the answer's status without one. */
  #problem({ status, text }: Answer): PretradeError {
    const { server } = this;
    const found = problemIn(text);
    if (found === undefined) {
      const words = `it answered with the HTTP status ${status}, and without saying why`;
      return new PretradeError(OF_PROXIES[status] ?? "UNKNOWN", words, { server });
    }
    return new PretradeError(found.code, found.detail ?? "it does not say why", {
      reason: found.reason,
      field: found.field,
      retryAfterMs: found.retry_after_seconds === undefined ? undefined : found.retry_after_seconds * 1_000,
      server,
    });
  }
}

interface Answer {
  readonly ok: boolean;
  readonly status: number;
  readonly text: string;
}

/** What the client reads of a problem. */
interface Problem {
  readonly code: Status;
  readonly detail?: string;
  readonly reason?: string;
  readonly field?: string;
  readonly retry_after_seconds?: number;
}

function problemIn(text: string): Problem | undefined {
  try {
    const found = JSON.parse(text);
    return isStatus(found?.code) ? found : undefined;
  } catch {
    return undefined; // a page of a proxy
  }
}

/** The deadline as the header `grpc-timeout` has it, rounded up. */
export function timeoutHeader(milliseconds: number): string {
  const whole = Math.ceil(milliseconds);
  return whole <= MOST ? `${whole}m` : `${Math.min(Math.ceil(whole / 1_000), MOST)}S`;
}

/** Browsers say no more than that it failed; Node says why in the cause. */
function lost(error: unknown): string {
  const { message, cause } = error as Error;
  const why = cause instanceof Error ? cause.message || (cause as NodeJS.ErrnoException).code : undefined;
  const hint = "location" in globalThis ? "; a browser does not say whether the server allows this page's origin" : "";
  return `there was no answer (${why ?? message})${hint}`;
}

/** The URL of a server; one that is relative belongs to the page. */
function urlOf(address: string): URL {
  const page = (globalThis as { location?: { href: string } }).location?.href;
  const url = URL.canParse(address, page) ? new URL(address, page) : undefined;
  if (url === undefined || !/^https?:$/.test(url.protocol) || url.search || url.hash || url.username) {
    const words = `servers: "${address}" is no address; it must be like https://host:port, without query and user`;
    throw invalid("INVALID_SERVER", "servers", words);
  }
  return url;
}
