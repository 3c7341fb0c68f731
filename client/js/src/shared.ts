/** Calls that many callers share. */

import type { CallOptions } from "./caller.js";
import type { Decision, Result } from "./decision.js";
import { PretradeError } from "./errors.js";
import type { Order } from "./gen/pretrade/decision/v1/decision_pb.js";
import { allow, type OrderFields, orderOf } from "./order.js";
import { after } from "./pause.js";
import { type Headers, isSameTrace, traceOf } from "./trace.js";

/** Under way at once. With one, every order would wait for the call before its own; with many, few orders share one. */
const CALLS = 4;
/** In one call: as many as a server decides at a time. */
const ORDERS = 64;
/** After its deadline, for the call that an order went with to say why it has failed. */
const GRACE_MS = 50;

/** What one order may say. */
export type SharedOptions = Pick<CallOptions, "timeoutMs" | "traceparent" | "tracestate">;

/** How the calls are made: with orders of the contract, the milliseconds that they may take, and their trace. */
export interface Asking {
  decide(order: Order, timeoutMs: number, trace: Headers): Promise<Decision>;
  decideBatch(orders: readonly Order[], timeoutMs: number, trace: Headers): Promise<Result[]>;
  timeoutOf(options: CallOptions): number;
}

/** An order that has no result yet. */
interface Waiting {
  readonly order: Order;
  readonly trace: Headers;
  readonly until: number;
  /** True once its caller has been told that there was no result in time. */
  isLate: boolean;
  readonly expiry: ReturnType<typeof setTimeout>;
  readonly resolve: (decision: Decision) => void;
  readonly reject: (error: unknown) => void;
}

/**
 * Decides orders in calls that their callers share.
 *
 * An order that comes while four calls are under way waits until one of them has ended, and then goes with all that have
 * come meanwhile, up to 64 in a call. Orders that come at the same moment go together, and one that comes alone waits
 * for nobody. Orders that can only reduce an exposure go first, and in calls without others: an overloaded server then
 * still takes them. A call carries the trace of its orders' callers, if all of them have the same one, and none otherwise.
 */
export class SharedCalls {
  readonly #reducing: Waiting[] = [];
  readonly #others: Waiting[] = [];
  #calls = 0;

  constructor(private readonly asking: Asking) {}

  /**
   * Decides one order.
   *
   * @param options - The deadline, which the wait for other calls is part of.
   * @throws PretradeError - There is no decision.
   */
  async decide(order: OrderFields, options: SharedOptions = {}): Promise<Decision> {
    const asked = orderOf(order);
    const timeoutMs = this.asking.timeoutOf(options);
    return new Promise((resolve, reject) => {
      const waiting: Waiting = {
        order: asked,
        trace: traceOf(options),
        until: performance.now() + timeoutMs,
        isLate: false,
        expiry: after(timeoutMs + GRACE_MS, () => expire(waiting)),
        resolve,
        reject,
      };
      (asked.reduceOnly ? this.#reducing : this.#others).push(waiting);
      if (this.#calls < CALLS) {
        this.#calls += 1;
        queueMicrotask(() => this.#call()); // after all orders of this moment have come
      }
    });
  }

  /** Makes calls while there is anything to ask. */
  async #call(): Promise<void> {
    for (let group = this.#next(); group.length > 0; group = this.#next()) {
      await this.#ask(group.filter((waiting) => !waiting.isLate));
    }
    this.#calls -= 1;
  }

  /** What goes in the next call. */
  #next(): Waiting[] {
    return (this.#reducing.length > 0 ? this.#reducing : this.#others).splice(0, ORDERS);
  }

  async #ask(group: readonly Waiting[]): Promise<void> {
    const [first] = group;
    if (first === undefined) {
      return;
    }
    const now = performance.now();
    const leftMs = Math.max(1, ...group.map(({ until }) => until - now));
    for (const { order, until } of group) {
      allow(order, Math.max(1, until - now));
    }
    try {
      if (group.length === 1) {
        settle(first, { decision: await this.asking.decide(first.order, leftMs, first.trace) });
      } else {
        const orders = group.map(({ order }) => order);
        const isOneTrace = group.every(({ trace }) => isSameTrace(trace, first.trace));
        const results = await this.asking.decideBatch(orders, leftMs, isOneTrace ? first.trace : {});
        group.forEach((waiting, place) => settle(waiting, results[place] ?? { error: missing(waiting) }));
      }
    } catch (error) {
      group.forEach((waiting) => settle(waiting, { error }));
    }
  }
}

function settle({ expiry, resolve, reject }: Waiting, result: { decision?: Decision | undefined; error?: unknown }): void {
  clearTimeout(expiry);
  result.decision ? resolve(result.decision) : reject(result.error);
}

function expire(waiting: Waiting): void {
  waiting.isLate = true;
  const words = "there was no result before the order's deadline";
  waiting.reject(new PretradeError("DEADLINE_EXCEEDED", words, { orderRef: waiting.order.orderRef }));
}

function missing({ order }: Waiting): PretradeError {
  return new PretradeError("INTERNAL", "the server sent fewer results than there were orders", order);
}
