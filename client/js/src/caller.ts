/** Asks for decisions: the steps of a call, whatever carries it. */

import { create } from "@bufbuild/protobuf";

import type { Call } from "./call.js";
import type { Attempt, Connection, Health } from "./connection.js";
import { Decision, type Result, resultOf } from "./decision.js";
import { invalid, PretradeError } from "./errors.js";
import {
  DecideBatchRequestSchema,
  DecideRequestSchema,
  type Order,
} from "./gen/pretrade/decision/v1/decision_pb.js";
import { type OrderFields, orderOf } from "./order.js";
import { pause } from "./pause.js";
import { HELD_MS } from "./retries.js";
import type { Servers } from "./servers.js";
import { SharedCalls } from "./shared.js";
import { type Headers, type Trace, traceOf } from "./trace.js";

/** Lets a call of reduce-only orders into a server that is overloaded. */
const REDUCE_ONLY = "pretrade-reduce-only";
const DEFAULT_TIMEOUT_MS = 1_000;
const DEFAULT_CONNECT_MS = 10_000;
const DEFAULT_HEALTH_MS = 1_000;

/** What every client may be told when it connects, whatever carries its calls. */
export interface CallerOptions {
  /** The deadline of a call that names none, in milliseconds; 1,000 by default. */
  readonly timeoutMs?: number | undefined;
  /** How long `Client.connect` waits for the first connection, in milliseconds; 10,000 by default. */
  readonly connectMs?: number | undefined;
}

/** What one call may say. */
export interface CallOptions extends Trace {
  /** The deadline, in milliseconds from now, for all attempts together. */
  readonly timeoutMs?: number | undefined;
  /** Metadata. */
  readonly headers?: Headers | undefined;
  /** Ends the call when it is aborted. */
  readonly signal?: AbortSignal | undefined;
}

/** What every call of `decide` may say. */
export interface DecideOptions extends CallOptions {
  /** True to learn why the model scored as it did. */
  readonly explain?: boolean | undefined;
}

/** The client without what carries its calls. */
export class Caller<C extends Connection> {
  readonly #options: CallerOptions;

  constructor(
    protected readonly servers: Servers<C>,
    options: CallerOptions,
  ) {
    this.#options = options;
  }

  /**
   * Decides one order.
   *
   * @throws PretradeError - There is no decision.
   */
  async decide(order: OrderFields, options: DecideOptions = {}): Promise<Decision> {
    return this.#decide(orderOf(order), options, traceOf(options));
  }

  /**
   * Decides up to 1,024 orders in one call: one result per order, in order.
   *
   * Orders that the server has no place for are sent again after the delay that it names, within the deadline.
   *
   * @throws PretradeError - None of them could be asked for.
   */
  async decideBatch(orders: readonly OrderFields[], options: CallOptions = {}): Promise<Result[]> {
    return this.#decideBatch(orders.map(orderOf), options, traceOf(options));
  }

  /** Calls that many callers share: cheaper than a call for each. It has nothing to be closed. */
  shared(): SharedCalls {
    return new SharedCalls({
      decide: (order, timeoutMs, trace) => this.#decide(order, { timeoutMs }, trace),
      decideBatch: (orders, timeoutMs, trace) => this.#decideBatch(orders, { timeoutMs }, trace),
      timeoutOf: (options) => this.timeoutOf(options),
    });
  }

  /**
   * What each server says of itself, by its address: `SERVING`, `NOT_SERVING`, `UNKNOWN` or `UNREACHABLE`.
   *
   * @param withinMs - How long to wait for each.
   */
  health(withinMs: number = DEFAULT_HEALTH_MS): Promise<Record<string, Health>> {
    return this.servers.health(withinMs);
  }

  /** Closes all connections. What was sent is still answered; every other call fails with CANCELLED. */
  close(): void {
    this.servers.close();
  }

  /** Waits for the first connection, and closes the client where there is none. */
  protected async connected(): Promise<this> {
    try {
      await this.servers.ready(this.#options.connectMs ?? DEFAULT_CONNECT_MS);
    } catch (error) {
      this.close();
      throw error;
    }
    return this;
  }

  /** The time for a call, in milliseconds. */
  protected timeoutOf(options: CallOptions): number {
    const timeoutMs = options.timeoutMs ?? this.#options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
    if (!(timeoutMs > 0 && Number.isFinite(timeoutMs))) {
      throw invalid("INVALID_TIMEOUT", "timeoutMs", `timeoutMs: it is ${timeoutMs}, and must be finite and above 0`);
    }
    return timeoutMs;
  }

  async #decide(order: Order, options: DecideOptions, trace: Headers): Promise<Decision> {
    const request = create(DecideRequestSchema); // with its fields, `create` takes longer than all the rest of this
    request.order = order;
    request.explain = options.explain ?? false;
    const call = this.servers.begin(this.timeoutOf(options), order.idempotencyKey !== "");
    const headers = headersOf(options, trace, order.reduceOnly);
    const answer = await ask(call, options, headers, (connection, attempt) => connection.decide(request, attempt));
    const { server } = call.server.connection;
    if (answer.decision === undefined) {
      throw new PretradeError("INTERNAL", "the server sent an answer without a decision", { server });
    }
    return new Decision(answer.decision, server, answer.explanation);
  }

  async #decideBatch(orders: readonly Order[], options: CallOptions, trace: Headers): Promise<Result[]> {
    const call = this.servers.begin(this.timeoutOf(options), orders.every(hasKey));
    const headers = headersOf(options, trace, orders.length > 0 && orders.every(isReduceOnly));
    const results: Result[] = [];
    let places = orders.map((_, place) => place);
    for (;;) {
      const request = create(DecideBatchRequestSchema);
      request.orders = places.map((place) => orders[place] as Order);
      try {
        const answer = await ask(call, options, headers, (connection, attempt) =>
          connection.decideBatch(request, attempt),
        );
        const { server } = call.server.connection;
        answer.results.forEach((result, index) => (results[places[index] as number] = resultOf(result, server)));
      } catch (error) {
        if (error instanceof PretradeError && results.length > 0) {
          return results; // each keeps its own refusal; the others have their decisions
        }
        throw error;
      }
      const delays = places.map((place) => delayMs(results[place], call.wasLost));
      places = places.filter((_, index) => delays[index] !== undefined);
      if (places.length === 0 || !call.waits(Math.max(...delays.map((delay) => delay ?? 0)))) {
        return results;
      }
    }
  }
}

/** Asks until there is an answer, as the rules of `Call` say. */
async function ask<C extends Connection, T>(
  call: Call<C>,
  { signal }: CallOptions,
  headers: Headers,
  attempt: (connection: C, attempt: Attempt) => Promise<T>,
): Promise<T> {
  for (;;) {
    signal?.throwIfAborted();
    if (call.pauseMs > 0) {
      await pause(call.pauseMs, signal);
      signal?.throwIfAborted();
    }
    const { connection } = call.server;
    const leftMs = call.attempt();
    let failure: PretradeError;
    try {
      const answer = await attempt(connection, { leftMs, headers, signal, waitsForConnection: call.waitsForConnection });
      call.answered();
      return answer;
    } catch (error) {
      if (signal?.aborted || !(error instanceof PretradeError)) {
        call.abandoned();
        throw signal?.aborted ? signal.reason : error;
      }
      failure = error;
    }
    call.failed(failure);
  }
}

/**
 * The servers that a caller names.
 *
 * @param form - What an address looks like.
 * @throws PretradeError - There is none.
 */
export function addressesOf(servers: string | readonly string[], form: string): readonly string[] {
  const addresses = typeof servers === "string" ? [servers] : servers;
  if (addresses.length === 0) {
    throw invalid("MISSING_SERVER", "servers", `servers: name at least one, as ${form}`);
  }
  return addresses;
}

function headersOf({ headers }: CallOptions, trace: Headers, isReduceOnly: boolean): Headers {
  return { ...headers, ...trace, ...(isReduceOnly ? { [REDUCE_ONLY]: "1" } : {}) };
}

/** After how many milliseconds an order of a batch is to be asked for again; undefined if it is not. */
function delayMs(result: Result | undefined, wasLost: boolean): number | undefined {
  const { status, retryAfterMs = Infinity } = result?.error ?? {};
  if (status === "RESOURCE_EXHAUSTED" && retryAfterMs < Infinity) {
    return retryAfterMs;
  }
  return status === "DEADLINE_EXCEEDED" && wasLost ? HELD_MS : undefined; // the server's cap; see `Call`
}

function hasKey(order: Order): boolean {
  return order.idempotencyKey !== "";
}

function isReduceOnly(order: Order): boolean {
  return order.reduceOnly;
}
