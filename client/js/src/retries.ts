/** When a call is made again, and after how long. */

import type { PretradeError } from "./errors.js";
import type { Status } from "./status.js";

const FIRST_MS = 5;
const LONGEST_MS = 100;
const FACTOR = 4;
/** Half of them is what a server may refuse in a row before its callers stop asking it again. */
const TOKENS = 50;
const TOKENS_BACK = 0.5;
const MAY_PASS: ReadonlySet<Status> = new Set<Status>(["RESOURCE_EXHAUSTED", "UNAVAILABLE", "CANCELLED"]);

/** True for an error that says nothing about the order, so that the same call may succeed a moment later. */
export function mayPass(error: PretradeError): boolean {
  return MAY_PASS.has(error.status) && error.retryAfterMs !== Infinity;
}

/** True where the server could not be reached, drains, or has reset the call: another one may answer at once. */
export function isLost(error: PretradeError): boolean {
  return error.status === "UNAVAILABLE" || error.status === "CANCELLED";
}

/**
 * After how many milliseconds a call is made again.
 *
 * What the server asks for; otherwise 5 ms, 20 ms, 80 ms and then 100 ms, each drawn from half of it to the whole.
 *
 * @param attempt - How often it has failed.
 */
export function delayMs(error: PretradeError, attempt: number, random: () => number = Math.random): number {
  if (error.retryAfterMs !== undefined) {
    return error.retryAfterMs;
  }
  return Math.min(FIRST_MS * FACTOR ** (attempt - 1), LONGEST_MS) * (0.5 + random() / 2);
}

/**
 * Stops callers of an overloaded server from asking it again.
 *
 * A refusal takes a token, an answer gives half of one back. While half of the tokens or fewer are left, a refused call
 * fails at once. Source: gRPC's retry throttling, https://github.com/grpc/proposal/blob/master/A6-client-retries.md.
 * Calls that were lost take none: a server that is gone cannot be overloaded.
 */
export class Throttle {
  #tokens = TOKENS;

  answered(): void {
    this.#tokens = Math.min(this.#tokens + TOKENS_BACK, TOKENS);
  }

  refused(): void {
    this.#tokens = Math.max(this.#tokens - 1, 0);
  }

  get isOpen(): boolean {
    return this.#tokens > TOKENS / 2;
  }
}
