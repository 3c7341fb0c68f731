/** The one error of this package. */

import type { Status } from "./status.js";

/** What is known of an error besides its status and its words. */
export interface ErrorFacts {
  /** A stable name in UPPER_SNAKE_CASE, for example `INVALID_QUANTITY`. Absent where no server has answered. */
  readonly reason?: string | undefined;
  /** The field that is to blame, as the contract names it, for example `quantity`. */
  readonly field?: string | undefined;
  /** After how many milliseconds the call may be made again; `Infinity` if never, absent where nobody says. */
  readonly retryAfterMs?: number | undefined;
  /** The order that has no decision, where it is one of a batch or stream. */
  readonly orderRef?: string | undefined;
  /** The server that was asked last. */
  readonly server?: string | undefined;
}

/**
 * An order that got no decision. Never a degraded decision: that is a decision, which names its source.
 *
 * The client has tried again, where that may help, until the deadline; see `retries.ts`. So it is of no use to repeat a
 * call at once.
 */
export class PretradeError extends Error {
  override readonly name = "PretradeError";
  readonly reason: string | undefined;
  readonly field: string | undefined;
  readonly retryAfterMs: number | undefined;
  readonly orderRef: string | undefined;
  readonly server: string | undefined;

  constructor(
    /** How the call ended. */
    readonly status: Status,
    /** One sentence for people: the server's own, where it has said why. `message` says more. */
    readonly words: string,
    facts: ErrorFacts = {},
  ) {
    super(sentence(status, words, facts));
    this.reason = facts.reason;
    this.field = facts.field;
    this.retryAfterMs = facts.retryAfterMs;
    this.orderRef = facts.orderRef;
    this.server = facts.server;
  }
}

/** What a caller can do about it, where the server's own words do not say it. */
const ADVICE: Partial<Record<Status, string>> = {
  ALREADY_EXISTS: "Give every new order a key of its own, or none: the client then makes one.",
  RESOURCE_EXHAUSTED: "Ask less often, or add servers.",
  DEADLINE_EXCEEDED: "Allow more time with timeoutMs.",
  UNAVAILABLE: "Is the server up, and is this its decision port?",
  UNAUTHENTICATED: "Give connect() a tokenFile, or a certificate and its key.",
  UNIMPLEMENTED: "Is this the decision port? It is 7001 by default; 7002 is for administration.",
  INTERNAL: "The server's log explains it.",
};

function sentence(status: Status, words: string, { server, reason }: ErrorFacts): string {
  const [who, why] = [server ? `${server} answered ` : "", reason ? ` (${reason})` : ""];
  const advice = ADVICE[status];
  return `${who}${status}${why}: ${words.replace(/\.$/, "")}.${advice ? ` ${advice}` : ""}`;
}

/** What the caller got wrong, found before anything was sent. */
export function invalid(reason: string, field: string, words: string): PretradeError {
  return new PretradeError("INVALID_ARGUMENT", words, { reason, field });
}
