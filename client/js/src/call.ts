/**
 * Which server a call goes to, and whether it is made again. The rules are those of the Python client:
 *
 * 1. A call goes to the first server that is well, in the order in which they were given.
 * 2. CANCELLED and UNAVAILABLE: the same server is asked again after a short pause, and the next one if it fails again.
 *    The connection to a process that has ended leads to another process of the same server, which knows its
 *    idempotency keys; another server does not.
 * 3. RESOURCE_EXHAUSTED with a delay: the next server at once; the same after the delay where there is no other, or
 *    where the refusal is about the caller and not about the server. Without a delay: never.
 * 4. DEADLINE_EXCEEDED: while another server could still answer, an attempt gets half of the time that is left, and the
 *    other one gets the rest. Otherwise the deadline has passed; unless an attempt was lost before and it was the
 *    server's own cap that passed: a process that was killed has claimed the key until then.
 * 5. Nothing is ever asked after the deadline, and an order without idempotency key only after a refusal.
 * 6. While too many attempts fail, none is made again on the same server: an overloaded server must not be asked even
 *    more often. A burst of calls that one lost connection has ended is no overload: as many failures are spare as twice
 *    the calls that were ever under way at once.
 */

import type { Connection } from "./connection.js";
import { PretradeError } from "./errors.js";
import { pauseMs } from "./retries.js";
import type { Server, Servers } from "./servers.js";
import type { Status } from "./status.js";

const SHARE = 0.5;
/** Milliseconds in which no server answers. */
const NO_CHANCE_MS = 1;
const ABOUT_THE_CALLER = "RATE_LIMITED";
const DRAINING = "DRAINING";
const REPEATED: ReadonlySet<Status> = new Set<Status>(["UNAVAILABLE", "CANCELLED"]);

/** One call: at first to one server, and perhaps again. Nothing here waits or talks to a network. */
export class Call<C extends Connection = Connection> {
  /** Where the next attempt goes. */
  server: Server<C>;
  /** Milliseconds before the next attempt. */
  pauseMs = 0;
  /** True if the next attempt waits for a connection, and does not fail without one. */
  waitsForConnection = false;
  /** True once an attempt was cut off: a process that is gone may hold the keys of its orders for a while. */
  wasLost = false;
  #left: readonly Server<C>[] = [];
  #here = 0;
  #earlier: PretradeError | undefined;

  constructor(
    private readonly servers: Servers<C>,
    private readonly until: number,
    private readonly isRepeatable: boolean,
  ) {
    this.server = servers.best([], true) ?? (servers.all[0] as Server<C>);
  }

  /**
   * Begins an attempt; returns how many milliseconds it may take.
   *
   * @throws PretradeError - The client is closed.
   */
  attempt(): number {
    this.servers.checkOpen();
    this.server.began();
    const leftMs = this.until - performance.now();
    return Math.max(NO_CHANCE_MS, this.#other(true) === undefined ? leftMs : leftMs * SHARE);
  }

  /** The attempt was answered. */
  answered(): void {
    this.server.answered();
  }

  /** The caller has left during the attempt. */
  abandoned(): void {
    this.server.abandoned();
  }

  /**
   * The attempt failed. Returns if there is to be another one, after `pauseMs`.
   *
   * @throws PretradeError - There is none: why.
   */
  failed(error: PretradeError): void {
    const { status } = error;
    const isLost = REPEATED.has(status) || status === "DEADLINE_EXCEEDED";
    isLost || status === "RESOURCE_EXHAUSTED" ? this.server.failed(isLost) : this.server.answered();
    if (!this.#goesOn(error)) {
      // What used the time up says more than that it is used up.
      const { status: before } = this.#earlier ?? {};
      throw status === "DEADLINE_EXCEEDED" && before && REPEATED.has(before) ? this.#earlier : error;
    }
    this.#earlier = error;
    this.wasLost ||= REPEATED.has(status);
  }

  /** True if orders of an answered call, which were refused, are to be asked for again after this delay. */
  waits(delayMs: number): boolean {
    this.server.refused();
    this.pauseMs = delayMs;
    return this.#fits(delayMs) && this.server.mayBeAskedAgain;
  }

  /** True if there is another attempt, where and when the fields say. */
  #goesOn(error: PretradeError): boolean {
    this.pauseMs = 0;
    if (!this.#fits(0)) {
      return false;
    }
    if (error.status === "RESOURCE_EXHAUSTED") {
      return this.#afterRefusal(error);
    }
    if (!this.isRepeatable) {
      return false;
    }
    if (error.status === "DEADLINE_EXCEEDED") {
      return this.#leaves(true) || (this.wasLost && this.#afterLoss(error));
    }
    return REPEATED.has(error.status) && this.#afterLoss(error);
  }

  #afterRefusal({ reason, retryAfterMs = Infinity }: PretradeError): boolean {
    if (retryAfterMs === Infinity) {
      return false;
    }
    if (reason !== ABOUT_THE_CALLER && this.#leaves(true)) {
      return true;
    }
    this.pauseMs = retryAfterMs;
    return this.#fits(retryAfterMs) && this.server.mayBeAskedAgain;
  }

  #afterLoss({ reason }: PretradeError): boolean {
    this.#here += 1;
    if ((this.#here > 1 || reason === DRAINING) && this.#leaves(this.#here <= 2)) {
      return true;
    }
    this.pauseMs = pauseMs(this.#here);
    // With nowhere else to go, the next attempt waits for the connection instead of asking for it again and again.
    this.waitsForConnection = this.servers.all.length === 1;
    this.#left = [];
    return this.#fits(this.pauseMs) && this.server.mayBeAskedAgain;
  }

  /** Goes to another server, if there is one. */
  #leaves(isWell: boolean): boolean {
    const other = this.#other(isWell);
    if (other === undefined) {
      return false;
    }
    this.#left = [...this.#left, this.server];
    [this.server, this.#here] = [other, 0];
    return true;
  }

  #other(isWell: boolean): Server<C> | undefined {
    return this.servers.all.length === 1 ? undefined : this.servers.best([...this.#left, this.server], isWell);
  }

  #fits(milliseconds: number): boolean {
    return performance.now() + milliseconds < this.until;
  }
}
