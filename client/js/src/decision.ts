/** The answer to an order, in a form that is easy to ask. */

import { durationMs, timestampDate } from "@bufbuild/protobuf/wkt";

import { PretradeError } from "./errors.js";
import {
  Action,
  type Decision as DecisionMessage,
  Degradation,
  type Explanation,
  type OrderError,
  type OrderResult,
  ReasonCode,
  Source,
} from "./gen/pretrade/decision/v1/decision_pb.js";
import { statusOf } from "./status.js";

/** A decision. The whole of it, as the contract has it, is `message`. */
export class Decision {
  constructor(
    readonly message: DecisionMessage,
    /** Address of the server that answered, as the client was given it. */
    readonly server: string,
    /** Why the model scored as it did; set where that was asked for. */
    readonly explanation: Explanation | undefined = undefined,
  ) {}

  /** Its id in the audit, a UUIDv7. */
  get decisionId(): string {
    return this.message.decisionId;
  }

  /** The caller's reference. */
  get orderRef(): string {
    return this.message.orderRef;
  }

  /** `TRADE`, `NO_TRADE` or `ABSTAIN`. */
  get action(): keyof typeof Action {
    return name(Action, this.message.action);
  }

  /** True if the order should trade; false for an answer that this version of the package does not know. */
  get trades(): boolean {
    return this.message.action === Action.TRADE;
  }

  /** True if there is no answer to rely on: treat it as you would treat a model that is down. */
  get abstains(): boolean {
    return this.message.action === Action.ABSTAIN;
  }

  /** Calibrated probability that the order is eligible, in [0, 1]; undefined where no model answered. */
  get score(): number | undefined {
    return this.message.score;
  }

  /** What the score was compared with. */
  get threshold(): number | undefined {
    return this.message.threshold;
  }

  /** Who answered, for example `PRIMARY`. */
  get source(): keyof typeof Source {
    return name(Source, this.message.source);
  }

  /** Why the action is what it is, for example `["SCORE_BELOW_THRESHOLD"]`. */
  get reasons(): (keyof typeof ReasonCode)[] {
    return this.message.reasons.map((code) => name(ReasonCode, code));
  }

  /** What went wrong on the way, for example `["PRIMARY_TIMEOUT"]`; empty for a clean decision. */
  get degradations(): (keyof typeof Degradation)[] {
    return this.message.degradations.map((code) => name(Degradation, code));
  }

  /** Name of the model that scored; empty where none did. */
  get modelName(): string {
    return this.message.modelName;
  }

  /** Version of the model that scored; empty where none did. */
  get modelVersion(): string {
    return this.message.modelVersion;
  }

  /** Age of the features in milliseconds; undefined without features. */
  get featureAgeMs(): number | undefined {
    return this.message.featureAge && durationMs(this.message.featureAge);
  }

  /** What the decision took on the server, in milliseconds. */
  get usedMs(): number {
    return (this.message.budget?.usedUs ?? 0) / 1_000;
  }

  /** When the server decided. */
  get decidedAt(): Date {
    return this.message.decidedAt ? timestampDate(this.message.decidedAt) : new Date(0);
  }

  toString(): string {
    const score = this.score === undefined ? "" : ` ${this.score.toFixed(3)}`;
    return `${this.action}${score} by ${this.source} (${this.reasons.join(", ")}) ${this.decisionId}`;
  }
}

/** What became of one order of a batch: a decision, or the error that `decide` would have thrown for it. */
export type Result =
  | { readonly orderRef: string; readonly decision: Decision; readonly error?: undefined }
  | { readonly orderRef: string; readonly decision?: undefined; readonly error: PretradeError };

/** The result in a message of the contract. */
export function resultOf(message: OrderResult, server: string): Result {
  const { orderRef, outcome } = message;
  if (outcome.case === "decision") {
    return { orderRef, decision: new Decision(outcome.value, server) };
  }
  return { orderRef, error: orderError(outcome.value, orderRef, server) };
}

function orderError(error: OrderError | undefined, orderRef: string, server: string): PretradeError {
  if (error === undefined) {
    return new PretradeError("INTERNAL", "the server sent a result without an outcome", { orderRef, server });
  }
  return new PretradeError(statusOf(error.code), error.message, {
    reason: error.reason,
    field: error.field || undefined,
    retryAfterMs: error.retryDelay && durationMs(error.retryDelay),
    orderRef,
    server,
  });
}

/** The name of an enum's value; that of a value which is newer than this package is its number. */
function name<E extends Record<string, string | number>>(of: E, value: number): keyof E {
  return (of[value] ?? `${value}`) as keyof E;
}
