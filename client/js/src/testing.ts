/**
 * `FakeServer`: a decision server for the unit tests of programs that call one. It decides what the test says.
 *
 * It is real, on loopback, by gRPC and by JSON over HTTP, so that what is tested is what runs. It checks an order's own
 * fields, remembers idempotency keys, and answers every method as a server does; `test/contract.test.js` holds both
 * against one another. It has no features, no models, no guards and no audit.
 */

import { create, toBinary } from "@bufbuild/protobuf";
import { durationFromMs, timestampNow } from "@bufbuild/protobuf/wkt";

import { type ErrorFacts, invalid, PretradeError } from "./errors.js";
import { asError, type FakeCalls, type Headers } from "./fake_calls.js";
import { FakeGrpcPort } from "./fake_grpc.js";
import { FakeHttpPort } from "./fake_http.js";
import {
  Action,
  type DecideBatchRequest,
  type DecideBatchResponse,
  DecideBatchResponseSchema,
  type DecideRequest,
  type DecideResponse,
  DecideResponseSchema,
  type Decision,
  DecisionSchema,
  Degradation,
  ExplanationStatus,
  type Order,
  OrderSchema,
  type OrderResult,
  OrderResultSchema,
  ReasonCode,
  Side,
  Source,
} from "./gen/pretrade/decision/v1/decision_pb.js";
import { codeOf, type Status } from "./status.js";

const LONGEST_NAME = 64;
const LARGEST_BATCH = 1_024;

/** A decision, in the words of the contract. */
export interface Answer {
  /** `TRADE` where it is absent. */
  readonly action?: keyof typeof Action;
  /** 0.9 where it is absent; null for none, as where no model has answered. */
  readonly score?: number | null;
  /** 0.8 where it is absent; null for none. */
  readonly threshold?: number | null;
  /** `PRIMARY` where it is absent. */
  readonly source?: keyof typeof Source;
  /** `SCORE_AT_OR_ABOVE_THRESHOLD` where it is absent. */
  readonly reasons?: readonly (keyof typeof ReasonCode)[];
  /** None where it is absent. */
  readonly degradations?: readonly (keyof typeof Degradation)[];
}

/** What besides the status is said of calls that fail. */
export interface Failure extends Pick<ErrorFacts, "reason" | "field" | "retryAfterMs"> {
  /** In the server's words. */
  readonly message?: string;
  /** How many calls fail; one where it is absent. */
  readonly times?: number;
}

/** How a fake server listens. */
export interface FakeOptions {
  /** The port for gRPC; a free one where it is absent. */
  readonly port?: number;
  /** The port for JSON over HTTP; a free one where it is absent. */
  readonly httpPort?: number;
}

/** A decision server that decides what it is told to. */
export class FakeServer implements FakeCalls {
  /** Every order that it was asked for, in their order, also those that it refused. */
  readonly orders: Order[] = [];
  /** What came with every call, and with every order of a stream. */
  readonly headers: Headers[] = [];
  /** What it says when it is asked for its health. */
  isHealthy = true;
  readonly #grpc: FakeGrpcPort;
  readonly #http: FakeHttpPort;
  readonly #failures: PretradeError[] = [];
  readonly #kept = new Map<string, { readonly content: string; readonly decision: Decision }>();
  #decide: (order: Order) => Decision = () => decisionOf({});
  #hanging: { readonly ended: Promise<void>; readonly end: () => void } | undefined;

  private constructor({ port = 0, httpPort = 0 }: FakeOptions) {
    this.#grpc = new FakeGrpcPort(this, port);
    this.#http = new FakeHttpPort(this, httpPort);
  }

  /** Starts one, which listens until `stop()`. */
  static async start(options: FakeOptions = {}): Promise<FakeServer> {
    const server = new FakeServer(options);
    await server.restart();
    return server;
  }

  /** Where it is asked by gRPC: `host:port`. */
  get address(): string {
    return `127.0.0.1:${this.#grpc.port}`;
  }

  /** Where it is asked by JSON over HTTP: `http://host:port`. */
  get url(): string {
    return `http://127.0.0.1:${this.#http.port}`;
  }

  /**
   * From now on every order gets this answer.
   *
   * @throws Error - The contract has no such word.
   */
  answer(answer: Answer = {}): void {
    const decision = decisionOf(answer);
    this.#decide = () => decision;
  }

  /** From now on every order is decided by this function, which may throw a `PretradeError`. */
  decideBy(decide: (order: Order) => Answer): void {
    this.#decide = (order) => decisionOf(decide(order));
  }

  /** The next call fails with this status, or as many as are named; an open stream ends with it at its next order. */
  fail(status: Status, { message = "the test says so", times = 1, ...facts }: Failure = {}): void {
    const error = new PretradeError(status, message, facts);
    this.#failures.push(...Array.from({ length: times }, () => error));
  }

  /** From now on nothing is answered, not even about its health, until `resume`. */
  hang(): void {
    let end = () => {};
    const ended = new Promise<void>((resolve) => (end = resolve));
    this.#hanging ??= { ended, end };
  }

  /** Answers again, what has waited too. */
  resume(): void {
    this.#hanging?.end();
    this.#hanging = undefined;
  }

  /** Ends at once, with all that is under way, as a process does that is killed. `restart` begins again. */
  async stop(): Promise<void> {
    await Promise.all([this.#grpc.stop(), this.#http.stop()]);
  }

  /** Listens again, on the ports that it had before. */
  async restart(): Promise<void> {
    await Promise.all([this.#grpc.start(), this.#http.start()]);
  }

  /** Waits while it hangs. For the ports. */
  async runs(): Promise<void> {
    await this.#hanging?.ended;
  }

  /**
   * A call, or an order of a stream, comes in. For the ports.
   *
   * @throws PretradeError - It is to fail.
   */
  async begin(headers: Headers): Promise<void> {
    await this.runs();
    this.headers.push(headers);
    const failure = this.#failures.shift();
    if (failure) {
      throw failure;
    }
  }

  /** What `Decide` answers. For the ports. */
  decide({ order, explain }: DecideRequest): DecideResponse {
    const decision = this.#decided(order ?? create(OrderSchema));
    const explanation = { status: ExplanationStatus.NO_MODEL, message: "a fake server has no model" };
    return create(DecideResponseSchema, { decision, ...(explain ? { explanation } : {}) });
  }

  /** What `DecideBatch` answers. For the ports. */
  decideBatch({ orders }: DecideBatchRequest): DecideBatchResponse {
    if (orders.length < 1 || orders.length > LARGEST_BATCH) {
      throw invalid("INVALID_ORDERS", "orders", `orders: must be 1 to ${LARGEST_BATCH}`);
    }
    return create(DecideBatchResponseSchema, { results: orders.map((order) => this.result(order)) });
  }

  /** What becomes of one order of a batch or stream. For the ports. */
  result(order: Order): OrderResult {
    const { orderRef } = order;
    try {
      return create(OrderResultSchema, { orderRef, outcome: { case: "decision", value: this.#decided(order) } });
    } catch (error) {
      const { status, reason = "", field = "", words, retryAfterMs } = asError(error);
      const isKnown = retryAfterMs !== undefined && retryAfterMs < Infinity;
      const again = isKnown ? { retryDelay: durationFromMs(Math.ceil(retryAfterMs)) } : {};
      const value = { code: codeOf(status), reason, field, message: words, ...again };
      return create(OrderResultSchema, { orderRef, outcome: { case: "error", value } });
    }
  }

  #decided(order: Order): Decision {
    this.orders.push(order);
    checkOrder(order);
    const key = JSON.stringify([order.strategy, order.idempotencyKey]);
    const content = contentOf(order);
    const kept = order.idempotencyKey ? this.#kept.get(key) : undefined;
    if (kept && kept.content !== content) {
      const words = "idempotency_key: already used for another order";
      throw new PretradeError("ALREADY_EXISTS", words, { reason: "IDEMPOTENCY_KEY_REUSED", field: "idempotency_key" });
    }
    const decision = kept?.decision ?? this.#anew(order);
    this.#kept.set(key, { content, decision });
    return decision;
  }

  #anew(order: Order): Decision {
    const own = { decisionId: crypto.randomUUID(), orderRef: order.orderRef, decidedAt: timestampNow() };
    return create(DecisionSchema, { ...this.#decide(order), ...own });
  }
}

function decisionOf(answer: Answer): Decision {
  const { action = "TRADE", score = 0.9, threshold = 0.8, source = "PRIMARY" } = answer;
  const { reasons = ["SCORE_AT_OR_ABOVE_THRESHOLD"], degradations = [] } = answer;
  return create(DecisionSchema, {
    action: word(Action, action),
    ...(score === null ? {} : { score }),
    ...(threshold === null ? {} : { threshold }),
    source: word(Source, source),
    reasons: reasons.map((one) => word(ReasonCode, one)),
    degradations: degradations.map((one) => word(Degradation, one)),
  });
}

function word<E extends Record<string, string | number>>(of: E, name: keyof E & string): number {
  const value = of[name];
  if (typeof value !== "number") {
    throw new Error(`the contract has no word ${name}; there are ${Object.keys(of).filter(isName).join(", ")}`);
  }
  return value;
}

function isName(key: string): boolean {
  return !/^\d/.test(key);
}

/** What makes an order the same as an earlier one with its key. */
function contentOf(order: Order): string {
  const { timeout: _, ...content } = order;
  return Buffer.from(toBinary(OrderSchema, create(OrderSchema, content))).toString("base64");
}

/**
 * The rules that need no market.
 *
 * @throws PretradeError - One is broken.
 */
function checkOrder(order: Order): void {
  if (!order.instrument) {
    throw invalid("UNKNOWN_INSTRUMENT", "instrument", "instrument: must be SYMBOL.VENUE");
  }
  if (order.side !== Side.BUY && order.side !== Side.SELL) {
    throw invalid("UNKNOWN_SIDE", "side", "side: must be SIDE_BUY or SIDE_SELL");
  }
  if (!isPositive(order.quantity)) {
    throw invalid("INVALID_QUANTITY", "quantity", "quantity: must be finite and > 0");
  }
  if (order.limitPrice !== undefined && !isPositive(order.limitPrice)) {
    throw invalid("INVALID_LIMIT_PRICE", "limit_price", "limit_price: must be finite and > 0");
  }
  for (const [field, value, least] of [
    ["strategy", order.strategy, 1],
    ["order_ref", order.orderRef, 0],
    ["idempotency_key", order.idempotencyKey, 0],
  ] as const) {
    if (value.length < least || value.length > LONGEST_NAME) {
      const words = `${field}: must be ${least} to ${LONGEST_NAME} characters`;
      throw invalid(`INVALID_${field.toUpperCase()}`, field, words);
    }
  }
}

function isPositive(value: number): boolean {
  return value > 0 && value < Infinity;
}
