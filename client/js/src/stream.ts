/** Streams of decisions, which many callers share: one to each server that is asked. */

import { create } from "@bufbuild/protobuf";
import type { ServiceError } from "@grpc/grpc-js";

import type { Call } from "./call.js";
import type { CallOptions } from "./caller.js";
import { type Decision, type Result, resultOf } from "./decision.js";
import { invalid, PretradeError } from "./errors.js";
import { DecideStreamRequestSchema, type Order, type OrderResult } from "./gen/pretrade/decision/v1/decision_pb.js";
import type { DecideStreamCall, GrpcConnection } from "./grpc.js";
import { allow, type OrderFields, orderOf } from "./order.js";
import { after, pause } from "./pause.js";
import type { Server, Servers } from "./servers.js";
import type { Headers } from "./trace.js";

/** What an order of a stream may say. */
export type StreamOptions = Pick<CallOptions, "timeoutMs">;

/** Orders on a stream whose callers have left without an answer, until it takes no more. */
const MOST_LEFT = 1_024;

/** One call of `DecideStream` to one server, until it ends. */
class OpenStream {
  readonly #call: DecideStreamCall;
  readonly #server: string;
  readonly #waiting = new Map<string, (result: Result) => void>();
  /** The references of orders whose callers have left without an answer: it may still come. */
  readonly #left = new Set<string>();
  #isLast = false;
  #failure: PretradeError | undefined;

  constructor(connection: GrpcConnection, call: DecideStreamCall) {
    this.#call = call;
    this.#server = connection.server;
    call.on("data", ({ result }) => result && this.#heard(result));
    call.on("error", (error: ServiceError) => this.#ended(connection.errorOf(error)));
    // "end" comes before either, and does not say how it has ended.
    call.on("status", () => {
      const facts = { server: this.#server };
      this.#ended(new PretradeError("UNAVAILABLE", "the server has ended the stream", facts));
    });
  }

  /** True if an order with this reference may be sent on it. */
  takes(orderRef: string): boolean {
    return !this.#isLast && !this.#left.has(orderRef);
  }

  /** Asks for an order that it takes, for so long; never fails. */
  ask(order: Order, leftMs: number): Promise<Result> {
    const { orderRef } = order;
    return new Promise((resolve) => {
      const timer = after(leftMs, () => {
        this.#left.add(orderRef);
        this.#isLast ||= this.#left.size >= MOST_LEFT;
        settle({ orderRef, error: this.#late(orderRef) });
      });
      const settle = (result: Result) => {
        clearTimeout(timer);
        this.#waiting.delete(orderRef);
        this.#endIfOver();
        resolve(result);
      };
      this.#waiting.set(orderRef, settle);
      if (this.#failure) {
        settle({ orderRef, error: this.#failure });
      } else {
        allow(order, leftMs);
        this.#call.write(create(DecideStreamRequestSchema, { order }));
      }
    });
  }

  /** Takes no more orders; those that are under way are still answered. */
  retire(): void {
    this.#isLast = true;
    this.#endIfOver();
  }

  #heard(message: OrderResult): void {
    const settle = this.#waiting.get(message.orderRef);
    if (settle) {
      settle(resultOf(message, this.#server));
    } else {
      this.#left.delete(message.orderRef);
    }
  }

  /** A stream that has ended takes the orders with it that it was to decide. */
  #ended(error: PretradeError): void {
    this.#isLast = true;
    this.#failure ??= error;
    for (const [orderRef, settle] of [...this.#waiting]) {
      settle({ orderRef, error });
    }
  }

  #late(orderRef: string): PretradeError {
    const words = "there was no result before the order's deadline";
    return new PretradeError("DEADLINE_EXCEEDED", words, { orderRef, server: this.#server });
  }

  #endIfOver(): void {
    if (this.#isLast && this.#waiting.size === 0 && !this.#failure) {
      this.#failure = new PretradeError("CANCELLED", "the stream is closed", { server: this.#server });
      this.#left.size > 0 ? this.#call.cancel() : this.#call.end();
    }
  }
}

/**
 * Decides orders over one stream to a server, on which they overtake one another: cheaper than a call for each.
 *
 * Every order goes where a call for it would go, and is asked for again like one. A stream that ends, because its server
 * does or is gone, is opened again for the next order.
 */
export class DecisionStream {
  readonly #streams = new Map<Server<GrpcConnection>, OpenStream>();
  readonly #underWay = new Set<string>();
  #count = 0;
  #ended: (() => void) | undefined;
  #isClosed = false;

  constructor(
    private readonly servers: Servers<GrpcConnection>,
    private readonly timeoutOf: (options: CallOptions) => number,
    private readonly headers: Headers,
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
    const { orderRef } = asked;
    if (this.#underWay.has(orderRef)) {
      throw invalid("ORDER_REF_UNDER_WAY", "order_ref", `an order ${orderRef} is already under way in this stream`);
    }
    const call = this.servers.begin(this.timeoutOf(options), asked.idempotencyKey !== "");
    this.#underWay.add(orderRef);
    try {
      return await this.#decide(asked, call);
    } finally {
      this.#underWay.delete(orderRef);
      if (this.#underWay.size === 0) {
        this.#ended?.();
      }
    }
  }

  /** Waits for the orders that are under way, and ends the stream. */
  async close(): Promise<void> {
    this.#isClosed = true;
    if (this.#underWay.size > 0) {
      await new Promise<void>((resolve) => (this.#ended = resolve));
    }
    for (const stream of this.#streams.values()) {
      stream.retire();
    }
  }

  /** Asks until there is an answer, as the rules of `Call` say. */
  async #decide(order: Order, call: Call<GrpcConnection>): Promise<Decision> {
    for (;;) {
      if (call.pauseMs > 0) {
        await pause(call.pauseMs);
      }
      const stream = this.#streamTo(call, order.orderRef);
      const { decision, error } = await stream.ask(order, call.attempt());
      if (decision) {
        call.answered();
        return decision;
      }
      if (error.status === "UNAVAILABLE") {
        stream.retire(); // its server is about to stop
      }
      call.failed(error);
    }
  }

  #streamTo({ server, waitsForConnection }: Call<GrpcConnection>, orderRef: string): OpenStream {
    this.servers.checkOpen();
    let stream = this.#streams.get(server);
    if (!stream?.takes(orderRef)) {
      const call = server.connection.decideStream(this.headers, waitsForConnection);
      stream?.retire();
      stream = new OpenStream(server.connection, call);
      this.#streams.set(server, stream);
    }
    return stream;
  }
}
