/** What the client needs of a server. */

import type {
  DecideBatchRequest,
  DecideBatchResponse,
  DecideRequest,
  DecideResponse,
} from "./gen/pretrade/decision/v1/decision_pb.js";

/** What a server says of itself; `UNREACHABLE` if it says nothing. */
export type Health = "SERVING" | "NOT_SERVING" | "UNKNOWN" | "UNREACHABLE";

/** How one attempt is made. */
export interface Attempt {
  /** How long it may take. */
  readonly leftMs: number;
  /** Metadata. */
  readonly headers: Readonly<Record<string, string>>;
  /** Ends the attempt. */
  readonly signal: AbortSignal | undefined;
  /** True if it waits for a connection, and does not fail without one, where the transport can do that. */
  readonly waitsForConnection: boolean;
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
  /** What it says of itself; never fails. */
  health(withinMs: number): Promise<Health>;
  close(): void;
}
