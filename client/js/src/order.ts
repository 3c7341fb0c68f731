/** An order as callers write it, and as the contract has it. */

import { create } from "@bufbuild/protobuf";
import { durationFromMs } from "@bufbuild/protobuf/wkt";

import { invalid } from "./errors.js";
import { FeatureVectorSchema, type Order, OrderSchema, Side } from "./gen/pretrade/decision/v1/decision_pb.js";

/** An order that the caller is about to send. */
export interface OrderFields {
  /** `SYMBOL.VENUE`, for example `BTCUSDT.BINANCE`. */
  readonly instrument: string;
  /** Whether it buys or sells. */
  readonly side: "buy" | "sell";
  /** In the base asset: finite, > 0. */
  readonly quantity: number;
  /** The strategy that wants to trade: 1 to 64 characters. */
  readonly strategy: string;
  /** In the quote currency: finite, > 0. Absent: a market order. */
  readonly limitPrice?: number | undefined;
  /** Your own reference, which the answer has as well: at most 64 characters. */
  readonly orderRef?: string | undefined;
  /** What makes the order safe to ask for twice: at most 64 characters. Absent: the client makes one. */
  readonly idempotencyKey?: string | undefined;
  /** True if the order can only reduce an exposure. */
  readonly reduceOnly?: boolean | undefined;
  /** Your own features instead of the server's. */
  readonly features?: { readonly featureSetId: string; readonly values: readonly number[] } | undefined;
}

const SIDES = { buy: Side.BUY, sell: Side.SELL } as const;
const TYPES: Readonly<Record<keyof OrderFields, string>> = {
  instrument: "string",
  side: "string",
  quantity: "number",
  strategy: "string",
  limitPrice: "number",
  orderRef: "string",
  idempotencyKey: "string",
  reduceOnly: "boolean",
  features: "object",
};

/**
 * The order of the contract.
 *
 * @returns With an idempotency key of its own, where the caller gives none.
 * @throws PretradeError - It has a name that orders do not have, a value of another type, or no such side. The server
 * checks everything else. In JavaScript nothing else notices a misspelt `limitPrice`, and the order would be decided as
 * a market order; and a quantity in quotes cannot be sent, which would end a stream for all its orders.
 */
export function orderOf(fields: OrderFields): Order {
  for (const name of Object.keys(fields)) {
    checkType(name, fields[name as keyof OrderFields]);
  }
  const side = SIDES[fields.side];
  if (side === undefined) {
    throw invalid("INVALID_SIDE", "side", `side: it is ${shown(fields.side)}, and must be "buy" or "sell"`);
  }
  const order = create(OrderSchema); // with its fields, `create` takes longer than all the rest of this
  order.instrument = fields.instrument;
  order.side = side;
  order.quantity = fields.quantity;
  order.strategy = fields.strategy;
  order.orderRef = fields.orderRef ?? "";
  order.idempotencyKey = fields.idempotencyKey ?? newKey();
  order.reduceOnly = fields.reduceOnly ?? false;
  if (fields.limitPrice !== undefined) {
    order.limitPrice = fields.limitPrice;
  }
  if (fields.features !== undefined) {
    order.features = create(FeatureVectorSchema, vector(fields.features));
  }
  return order;
}

/** Tells the server of a stream how much time is left for an order, rounded up to a whole millisecond. */
export function allow(order: Order, leftMs: number): void {
  order.timeout = durationFromMs(Math.ceil(leftMs));
}

/** A key that no other order has. A browser has `randomUUID` only for pages that came over TLS or from this machine. */
function newKey(): string {
  return crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint32Array(4)), hex).join("");
}

function hex(word: number): string {
  return word.toString(16).padStart(8, "0");
}

/** What a caller wrote, for a message. */
function shown(value: unknown): string {
  return typeof value === "object" ? JSON.stringify(value) : typeof value === "string" ? `"${value}"` : String(value);
}

function checkType(name: string, value: unknown): void {
  if (!Object.hasOwn(TYPES, name)) {
    throw invalid("UNKNOWN_FIELD", name, `an order has no field ${name}; there are ${Object.keys(TYPES).join(", ")}`);
  }
  const type = TYPES[name as keyof OrderFields];
  if (value !== undefined && (value === null || typeof value !== type)) {
    throw invalid("INVALID_TYPE", name, `${name}: it is ${shown(value)}, and must be a ${type}`);
  }
}

function vector(given: NonNullable<OrderFields["features"]>) {
  const { featureSetId, values } = given;
  if (typeof featureSetId !== "string" || !Array.isArray(values) || values.some((value) => typeof value !== "number")) {
    const words = "features: it must have a string, featureSetId, and an array of numbers, values";
    throw invalid("INVALID_TYPE", "features", words);
  }
  return { featureSetId, values: [...values] };
}
