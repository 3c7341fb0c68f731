/** The servers of a client, and what it knows of each. */

import { Call } from "./call.js";
import type { Connection, Health } from "./connection.js";
import { PretradeError } from "./errors.js";
import { SPARE_FAILURES } from "./retries.js";

/** How often a server that is away is asked whether it serves again, and how long it has for its answer. */
const LOOK_MS = 250;
const LOOK_WITHIN_MS = 1_000;
const FAILURES_TO_LEAVE = 3;

/** One server, and how it did. */
export class Server<C extends Connection = Connection> {
  #underWay = 0;
  #most = 0;
  #spent = 0;
  #failures = 0;

  constructor(
    readonly connection: C,
    private readonly onAway: (server: Server<C>) => void,
  ) {}

  /** True if it failed so often that others are asked first. */
  get isAway(): boolean {
    return this.#failures >= FAILURES_TO_LEAVE;
  }

  /** True while so few attempts fail that one more is no burden. */
  get mayBeAskedAgain(): boolean {
    return this.#spent < Math.max(SPARE_FAILURES, 2 * this.#most);
  }

  /** An attempt goes to it. */
  began(): void {
    this.#underWay += 1;
    this.#most = Math.max(this.#most, this.#underWay);
  }

  /** An attempt was answered, with a decision or with an error that says nothing against the server. */
  answered(): void {
    this.#underWay -= 1;
    this.#failures = 0;
    this.#spent = Math.max(0, this.#spent - 0.5);
  }

  /**
   * An attempt failed.
   *
   * @param isLost - True if that says that the server cannot be reached, and not only that it is busy.
   */
  failed(isLost: boolean): void {
    this.#underWay -= 1;
    this.#spent += 1;
    if (isLost) {
      this.#failures += 1;
      if (this.isAway) {
        this.onAway(this);
      }
    }
  }

  /** The caller of an attempt has left. */
  abandoned(): void {
    this.#underWay -= 1;
  }

  /** Orders of a call that was answered were refused. */
  refused(): void {
    this.#spent += 1;
  }

  /** Its health service says that it serves. */
  isWell(): void {
    this.#failures = 0;
  }
}

/**
 * The servers in the order in which they are preferred. `call.ts` says which one is asked.
 *
 * One that fails three attempts in a row is away: it is asked last, until its health service says SERVING. It is asked
 * for that four times a second, while nobody waits for it.
 */
export class Servers<C extends Connection = Connection> {
  readonly all: readonly Server<C>[];
  readonly #looking = new Map<Server<C>, ReturnType<typeof setTimeout>>();
  #isClosed = false;

  constructor(connections: readonly C[]) {
    this.all = connections.map((connection) => new Server(connection, (server) => this.#lookAfter(server)));
  }

  /**
   * A call that has to end within so many milliseconds.
   *
   * @param isRepeatable - True if every order of the call has an idempotency key.
   * @throws PretradeError - They are closed.
   */
  begin(timeoutMs: number, isRepeatable: boolean): Call<C> {
    this.checkOpen();
    return new Call(this, performance.now() + timeoutMs, isRepeatable);
  }

  /** The first server but these that is well, or that is there at all. */
  best(without: readonly Server<C>[], isWell: boolean): Server<C> | undefined {
    return this.all.find((server) => !without.includes(server) && !(isWell && server.isAway));
  }

  /** @throws PretradeError - They are closed. */
  checkOpen(): void {
    if (this.#isClosed) {
      throw new PretradeError("CANCELLED", "the client is closed");
    }
  }

  /**
   * Waits until one of them can be asked.
   *
   * @throws PretradeError - None can in time: why the first one cannot.
   */
  async ready(withinMs: number): Promise<void> {
    try {
      await Promise.any(this.all.map(({ connection }) => connection.ready(withinMs)));
    } catch (error) {
      throw error instanceof AggregateError ? error.errors[0] : error;
    }
  }

  /** What each says of itself, by its address. */
  async health(withinMs: number): Promise<Record<string, Health>> {
    const found = this.all.map(async ({ connection }) => [connection.server, await connection.health(withinMs)] as const);
    return Object.fromEntries(await Promise.all(found));
  }

  close(): void {
    this.#isClosed = true;
    for (const timer of this.#looking.values()) {
      clearTimeout(timer);
    }
    for (const { connection } of this.all) {
      connection.close();
    }
  }

  #lookAfter(server: Server<C>): void {
    if (this.#isClosed || this.all.length === 1 || this.#looking.has(server)) {
      return; // the only one is asked anyway
    }
    const timer = setTimeout(async () => {
      const isServing = (await server.connection.health(LOOK_WITHIN_MS)) === "SERVING";
      this.#looking.delete(server);
      if (isServing) {
        server.isWell();
      } else if (server.isAway) {
        this.#lookAfter(server);
      }
    }, LOOK_MS);
    this.#looking.set(server, timer);
    (timer as { unref?: () => void }).unref?.(); // a program may end meanwhile; a browser's timer is a number
  }
}
