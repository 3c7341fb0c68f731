/** Which of several servers is asked. */

import type { Connection } from "./connection.js";
import { PretradeError } from "./errors.js";
import { delayMs, isLost, mayPass, Throttle } from "./retries.js";

/** How often a server that was lost is asked whether it serves again, and how long it has for its answer. */
const LOOK_MS = 250;
const LOOK_WITHIN_MS = 1_000;

/** One server, and how it did. */
export class Server<C extends Connection = Connection> {
  readonly throttle = new Throttle();
  isUp = true;

  constructor(readonly connection: C) {}
}

/**
 * The servers in the order in which they are preferred.
 *
 * The first one that is up is asked. A server is down from the first call that it loses until its health service says
 * SERVING: no call is spent on finding out. One that has let a deadline pass is asked for its health, too, since
 * nothing else tells a server that is gone without a word. Where all are down they are asked in turn, since one may be
 * back.
 */
export class Servers<C extends Connection = Connection> {
  readonly #servers: readonly Server<C>[];
  readonly #looking = new Map<Server<C>, ReturnType<typeof setTimeout>>();
  #isClosed = false;

  constructor(connections: readonly C[]) {
    this.#servers = connections.map((connection) => new Server(connection));
  }

  /**
   * @param attempt - How often the call has failed.
   * @throws PretradeError - They are closed.
   */
  choose(attempt: number): Server<C> {
    if (this.#isClosed) {
      throw new PretradeError("CANCELLED", "the client is closed");
    }
    const chosen = this.#servers.find((server) => server.isUp) ?? this.#servers[attempt % this.#servers.length];
    return chosen as Server<C>;
  }

  answered(server: Server<C>): void {
    server.throttle.answered();
  }

  /**
   * Takes note of a failure.
   *
   * @param attempt - How often the call has failed, this time included.
   * @returns After how many milliseconds the call may be made again; undefined if that would not help.
   */
  failed(server: Server<C>, error: PretradeError, attempt: number): number | undefined {
    if (error.status === "DEADLINE_EXCEEDED") {
      this.late(server);
    }
    if (this.#isClosed || !mayPass(error)) {
      return undefined;
    }
    if (isLost(error)) {
      return this.#lost(server) ? 0 : delayMs(error, attempt);
    }
    server.throttle.refused();
    return server.throttle.isOpen ? delayMs(error, attempt) : undefined;
  }

  /** Takes note of a deadline that passed without an answer. */
  late(server: Server<C>): void {
    if (this.#servers.length > 1) {
      this.#lookAfter(server);
    }
  }

  /** True where another one is to be preferred to this one. */
  isPassed(server: Server<C>): boolean {
    const chosen = this.choose(0);
    return chosen.isUp && chosen !== server;
  }

  /**
   * Waits until one of them can be asked.
   *
   * @throws PretradeError - None can in time: why the first one cannot.
   */
  async ready(withinMs: number): Promise<void> {
    try {
      await Promise.any(this.#servers.map(({ connection }) => connection.ready(withinMs)));
    } catch (error) {
      throw error instanceof AggregateError ? error.errors[0] : error;
    }
  }

  close(): void {
    this.#isClosed = true;
    for (const timer of this.#looking.values()) {
      clearTimeout(timer);
    }
    for (const { connection } of this.#servers) {
      connection.close();
    }
  }

  /** @returns True where another one is up. */
  #lost(server: Server<C>): boolean {
    if (this.#servers.length === 1) {
      return false;
    }
    server.isUp = false;
    this.#lookAfter(server);
    return this.#servers.some((each) => each.isUp);
  }

  #lookAfter(server: Server<C>): void {
    if (this.#isClosed || this.#looking.has(server)) {
      return;
    }
    const timer = setTimeout(async () => {
      server.isUp = await server.connection.isServing(LOOK_WITHIN_MS);
      this.#looking.delete(server);
      if (!server.isUp) {
        this.#lookAfter(server);
      }
    }, LOOK_MS);
    this.#looking.set(server, timer);
    (timer as { unref?: () => void }).unref?.(); // a program may end meanwhile; a browser's timer is a number
  }
}
