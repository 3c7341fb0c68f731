/** What the client needs of a server. */

import type {
  DecideBatchRequest,
  DecideBatchResponse,
  DecideRequest,
  DecideResponse,
} from "./gen/pretrade/decision/v1/decision_pb.js";

/** How one attempt is made. */
export interface Attempt {
  /** What is left of the deadline. */
  readonly leftMs: number;
  /** Metadata. */
  readonly headers: Readonly<Record<string, string>>;
  /** Ends the attempt. */
  readonly signal: AbortSignal | undefined;
}

/** A server that can be asked. */
export interface Connection {
  /** Its address. */
  readonly server: string;
  decide(request: DecideRequest, attempt: Attempt): Promise<DecideResponse>;
  decideBatch(request: DecideBatchRequest, attempt: Attempt): Promise<DecideBatchResponse>;
  /**
   * Waits until it can be asked.
   *
   * @throws PretradeError - It cannot in time.
   */
  ready(withinMs: number): Promise<void>;
  /** Whether it says that it serves; never fails. */
  isServing(withinMs: number): Promise<boolean>;
  close(): void;
}
