/** Asks for decisions: the steps of a call, whatever carries it. */

import { create } from "@bufbuild/protobuf";

import type { Connection } from "./connection.js";
import { Decision, type Result, resultOf } from "./decision.js";
import { invalid, PretradeError } from "./errors.js";
import {
  DecideBatchRequestSchema,
  DecideRequestSchema,
  type Order,
} from "./gen/pretrade/decision/v1/decision_pb.js";
import { type OrderFields, orderOf } from "./order.js";
import { pause } from "./pause.js";
import { delayMs, mayPass } from "./retries.js";
import type { Server, Servers } from "./servers.js";
import { SharedCalls } from "./shared.js";

/** Lets a call of reduce-only orders into a server that is overloaded. */
const REDUCE_ONLY = "pretrade-reduce-only";
const DEFAULT_TIMEOUT_MS = 1_000;
const DEFAULT_CONNECT_MS = 10_000;

/** What every client may be told when it connects, whatever carries its calls. */
export interface CallerOptions {
  /** The deadline of a call that names none, in milliseconds; 1,000 by default. */
  readonly timeoutMs?: number | undefined;
  /** How long `Client.connect` waits for the first connection, in milliseconds; 10,000 by default. */
  readonly connectMs?: number | undefined;
}

/** What one call may say. */
export interface CallOptions {
  /** The deadline, in milliseconds from now, for all attempts together. */
  readonly timeoutMs?: number | undefined;
  /** Metadata, for example `{ traceparent }` of the W3C's trace context. */
  readonly headers?: Readonly<Record<string, string>> | undefined;
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
    return this.#decide(orderOf(order), options);
  }

  /**
   * Decides up to 1,024 orders in one call: one result per order, in order.
   *
   * Orders that the server has no place for are sent again after the delay that it names, within the deadline.
   *
   * @throws PretradeError - None of them could be asked for.
   */
  async decideBatch(orders: readonly OrderFields[], options: CallOptions = {}): Promise<Result[]> {
    return this.#decideBatch(orders.map(orderOf), options);
  }

  /** Calls that many callers share: cheaper than a call for each. It has nothing to be closed. */
  shared(): SharedCalls {
    return new SharedCalls({
      decide: (order, timeoutMs) => this.#decide(order, { timeoutMs }),
      decideBatch: (orders, timeoutMs) => this.#decideBatch(orders, { timeoutMs }),
      timeoutOf: (options) => this.timeoutOf(options),
    });
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

  async #decide(order: Order, options: DecideOptions): Promise<Decision> {
    const request = create(DecideRequestSchema, { order, explain: options.explain ?? false });
    const { answer } = await this.#ask(options, [order], (connection, attempt) => connection.decide(request, attempt));
    if (answer.decision === undefined) {
      throw new PretradeError("INTERNAL", "the server sent an answer without a decision");
    }
    return new Decision(answer.decision, answer.explanation);
  }

  async #decideBatch(asked: readonly Order[], options: CallOptions): Promise<Result[]> {
    const timeoutMs = this.timeoutOf(options);
    const until = performance.now() + timeoutMs;
    const results = await this.#batch(asked, { ...options, timeoutMs });
    for (let attempt = 1; ; attempt += 1) {
      if (!results.some(isToBeAskedAgain)) {
        return results;
      }
      const again = [...results.entries()].filter(([, result]) => isToBeAskedAgain(result));
      const waitMs = Math.max(...again.map(([, result]) => delayMs(result.error as PretradeError, attempt)));
      const leftMs = until - performance.now() - waitMs;
      if (leftMs <= 0) {
        return results;
      }
      await pause(waitMs, options.signal);
      try {
        const more = await this.#batch(
          again.map(([place]) => asked[place] as Order),
          { ...options, timeoutMs: leftMs },
        );
        again.forEach(([place], index) => (results[place] = more[index] as Result));
      } catch (error) {
        if (error instanceof PretradeError) {
          return results; // each keeps its own refusal; the others have their decisions
        }
        throw error;
      }
    }
  }

  async #batch(orders: readonly Order[], options: CallOptions): Promise<Result[]> {
    const request = create(DecideBatchRequestSchema, { orders: [...orders] });
    const { answer, server } = await this.#ask(options, orders, (connection, attempt) =>
      connection.decideBatch(request, attempt),
    );
    return answer.results.map((result) => resultOf(result, server));
  }

  /** Makes a call, and makes it again where that may help and can still end before the deadline. */
  async #ask<T>(
    options: CallOptions,
    orders: readonly Order[],
    ask: (connection: C, attempt: Parameters<Connection["decide"]>[1]) => Promise<T>,
  ): Promise<{ answer: T; server: string }> {
    const until = performance.now() + this.timeoutOf(options);
    const headers = { ...options.headers, ...(isReduceOnly(orders) ? { [REDUCE_ONLY]: "1" } : {}) };
    let before: PretradeError | undefined;
    for (let attempt = 0; ; ) {
      options.signal?.throwIfAborted();
      const server: Server<C> = this.servers.choose(attempt);
      try {
        const leftMs = until - performance.now();
        const answer = await ask(server.connection, { leftMs, headers, signal: options.signal });
        this.servers.answered(server);
        return { answer, server: server.connection.server };
      } catch (error) {
        options.signal?.throwIfAborted();
        if (!(error instanceof PretradeError)) {
          throw error;
        }
        attempt += 1;
        const waitMs = this.servers.failed(server, error, attempt);
        if (waitMs === undefined || performance.now() + waitMs >= until) {
          // What used the time up says more than that it is used up.
          throw error.status === "DEADLINE_EXCEEDED" && before ? before : error;
        }
        before = error;
        await pause(waitMs, options.signal);
      }
    }
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

function isToBeAskedAgain({ error }: Result): boolean {
  return error !== undefined && mayPass(error);
}

function isReduceOnly(orders: readonly Order[]): boolean {
  return orders.length > 0 && orders.every((order) => order.reduceOnly);
}
