/** What the ports of a `FakeServer` ask it. */

import { PretradeError } from "./errors.js";
import type {
  DecideBatchRequest,
  DecideBatchResponse,
  DecideRequest,
  DecideResponse,
  Order,
  OrderResult,
} from "./gen/pretrade/decision/v1/decision_pb.js";

/** What a call brings besides its request, by name in lower case. */
export type Headers = Readonly<Record<string, string>>;

/** Who answers the calls. */
export interface FakeCalls {
  /** Whether it says that it serves. */
  readonly isHealthy: boolean;
  /** Waits while it hangs. */
  runs(): Promise<void>;
  /**
   * A call, or an order of a stream, comes in.
   *
   * @throws PretradeError - It is to fail.
   */
  begin(headers: Headers): Promise<void>;
  decide(request: DecideRequest): DecideResponse;
  decideBatch(request: DecideBatchRequest): DecideBatchResponse;
  /** What becomes of one order of a batch or stream. */
  result(order: Order): OrderResult;
}

/** An error as callers hear of it: what is none of ours is a fault of the test's own function. */
export function asError(error: unknown): PretradeError {
  return error instanceof PretradeError ? error : new PretradeError("INTERNAL", `the test's function failed: ${error}`);
}
