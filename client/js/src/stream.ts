/** One stream of decisions, which many callers share. */

import { create } from "@bufbuild/protobuf";
import type { ServiceError } from "@grpc/grpc-js";

import type { CallOptions } from "./caller.js";
import { type Decision, resultOf } from "./decision.js";
import { invalid, PretradeError } from "./errors.js";
import { DecideStreamRequestSchema, type Order, type OrderResult } from "./gen/pretrade/decision/v1/decision_pb.js";
import type { DecideStreamCall, GrpcConnection } from "./grpc.js";
import { allow, type OrderFields, orderOf } from "./order.js";
import { after } from "./pause.js";
import type { Server, Servers } from "./servers.js";

/** What an order of a stream may say. */
export type StreamOptions = Pick<CallOptions, "timeoutMs">;

/** An order that has no result yet. */
interface Waiting {
  readonly order: Order;
  /** Where it was sent to last; undefined while it waits to be sent again. */
  sentOn: Opened | undefined;
  attempts: number;
  /** Why it was not decided the last time. */
  last: PretradeError | undefined;
  readonly until: number;
  readonly expiry: ReturnType<typeof setTimeout>;
  readonly resolve: (decision: Decision) => void;
  readonly reject: (error: PretradeError) => void;
}

/** A call of `DecideStream` that is open. */
interface Opened {
  readonly call: DecideStreamCall;
  readonly server: Server<GrpcConnection>;
}

/**
 * Decides orders over one stream, on which they overtake one another: cheaper than a call for each.
 *
 * A stream that ends, because its server does or is gone, is opened again, where need be to another server, and the
 * orders that have no result are sent again with the idempotency keys that they had.
 */
export class DecisionStream {
  readonly #waiting = new Map<string, Waiting>();
  #opened: Opened | undefined;
  #attempt = 0;
  #count = 0;
  #ended: (() => void) | undefined;
  #isClosed = false;

  constructor(
    private readonly servers: Servers<GrpcConnection>,
    private readonly timeoutOf: (options: CallOptions) => number,
    private readonly headers: Readonly<Record<string, string>>,
  ) {}

  /**
   * Decides one order.
   *
   * @param order - One without an `orderRef` gets one.
   * @throws PretradeError - There is no decision, or another order with the same `orderRef` is under way.
   */
  async decide(order: OrderFields, options: StreamOptions = {}): Promise<Decision> {
    if (this.#isClosed) {
      throw new PretradeError("CANCELLED", "the stream is closed");
    }
    const asked = orderOf(order);
    asked.orderRef ||= `stream-${(this.#count += 1)}`;
    if (this.#waiting.has(asked.orderRef)) {
      const words = `an order ${asked.orderRef} is already under way in this stream`;
      throw invalid("ORDER_REF_UNDER_WAY", "order_ref", words);
    }
    const timeoutMs = this.timeoutOf(options);
    return new Promise((resolve, reject) => {
      const waiting: Waiting = {
        order: asked,
        sentOn: undefined,
        attempts: 0,
        last: undefined,
        until: performance.now() + timeoutMs,
        expiry: after(timeoutMs, () => this.#expire(waiting)),
        resolve,
        reject,
      };
      this.#waiting.set(asked.orderRef, waiting);
      this.#send(waiting);
    });
  }

  /** Waits for the orders that are under way, and ends the stream. */
  async close(): Promise<void> {
    this.#isClosed = true;
    if (this.#waiting.size > 0) {
      await new Promise<void>((resolve) => (this.#ended = resolve));
    }
    this.#opened?.call.end();
    this.#opened = undefined;
  }

  #send(waiting: Waiting): void {
    try {
      if (this.#opened && this.servers.isPassed(this.#opened.server)) {
        this.#opened.call.end(); // what was sent on it is still answered
        this.#opened = undefined;
      }
      this.#opened ??= this.#open();
      waiting.sentOn = this.#opened;
      allow(waiting.order, waiting.until - performance.now());
      this.#opened.call.write(create(DecideStreamRequestSchema, { order: waiting.order }));
    } catch (error) {
      this.#settle(waiting);
      waiting.reject(error as PretradeError); // the client is closed, or its token's file is gone
    }
  }

  #open(): Opened {
    const server = this.servers.choose(this.#attempt);
    const opened: Opened = { server, call: server.connection.decideStream(this.headers) };
    opened.call.on("data", ({ result }) => result && this.#heard(opened, result));
    opened.call.on("error", (error: ServiceError) => this.#lost(opened, server.connection.errorOf(error)));
    opened.call.on("end", () => {
      const { server: address } = server.connection;
      this.#lost(opened, new PretradeError("UNAVAILABLE", "the server has ended the stream", { server: address }));
    });
    return opened;
  }

  #heard(opened: Opened, message: OrderResult): void {
    const waiting = this.#waiting.get(message.orderRef);
    if (waiting === undefined) {
      return; // its deadline has passed
    }
    const result = resultOf(message, opened.server.connection.server);
    if (result.decision) {
      this.#attempt = 0;
      this.servers.answered(opened.server);
      this.#settle(waiting);
      waiting.resolve(result.decision);
    } else {
      waiting.attempts += 1;
      this.#failed(waiting, result.error, this.servers.failed(opened.server, result.error, waiting.attempts));
    }
  }

  /** A stream that has ended takes the orders with it that it was to decide. */
  #lost(opened: Opened, error: PretradeError): void {
    if (this.#opened === opened) {
      this.#opened = undefined;
    }
    const lost = [...this.#waiting.values()].filter((waiting) => waiting.sentOn === opened);
    if (lost.length === 0) {
      return;
    }
    this.#attempt += 1;
    const waitMs = this.servers.failed(opened.server, error, this.#attempt);
    for (const waiting of lost) {
      waiting.attempts += 1;
      this.#failed(waiting, error, waitMs);
    }
  }

  /** Sends an order again after so long, or gives it up. */
  #failed(waiting: Waiting, error: PretradeError, waitMs: number | undefined): void {
    waiting.last = error;
    waiting.sentOn = undefined;
    if (waitMs === undefined || performance.now() + waitMs >= waiting.until) {
      this.#settle(waiting);
      waiting.reject(error);
    } else {
      setTimeout(() => this.#waiting.get(waiting.order.orderRef) === waiting && this.#send(waiting), waitMs);
    }
  }

  #expire(waiting: Waiting): void {
    this.#settle(waiting);
    if (waiting.sentOn) {
      this.servers.late(waiting.sentOn.server);
    }
    const words = "there was no result before the order's deadline";
    waiting.reject(waiting.last ?? new PretradeError("DEADLINE_EXCEEDED", words, { orderRef: waiting.order.orderRef }));
  }

  #settle(waiting: Waiting): void {
    clearTimeout(waiting.expiry);
    this.#waiting.delete(waiting.order.orderRef);
    if (this.#waiting.size === 0) {
      this.#ended?.();
    }
  }
}
