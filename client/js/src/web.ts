/** The client for browsers, by JSON over HTTP. It needs `fetch` and nothing of Node, which it runs in as well. */

import { addressesOf, Caller, type CallerOptions } from "./caller.js";
import { HttpConnection, type Token } from "./http.js";
import { Servers } from "./servers.js";

export type { CallOptions, DecideOptions } from "./caller.js";
export type { Health } from "./connection.js";
export { Decision, type Result } from "./decision.js";
export { type ErrorFacts, PretradeError } from "./errors.js";
export type { Token } from "./http.js";
export type { OrderFields } from "./order.js";
export type { SharedCalls, SharedOptions } from "./shared.js";
export type { Status } from "./status.js";

/** How a client calls. */
export interface ClientOptions extends CallerOptions {
  /** The caller's token, or what gives it, which is asked for every call. */
  readonly token?: Token | undefined;
}

/** Asks for decisions by JSON over HTTP. One client is enough for a whole page. */
export class Client extends Caller<HttpConnection> {
  /**
   * Connects to a server.
   *
   * @param servers - The URL of its HTTP port, for example `https://pretrade.example.com:7004`, or several, best first.
   * The first one that is up is asked. In a page, a URL may be relative to it. A server on another machine does not
   * remember idempotency keys: an order that was lost on the way back from one may be decided by the other again.
   * @throws PretradeError - None could be reached within `connectMs`, or a token would travel in the open.
   */
  static async connect(servers: string | readonly string[], options: ClientOptions = {}): Promise<Client> {
    const addresses = addressesOf(servers, "http://host:port");
    const connections = addresses.map((address) => new HttpConnection(address, options.token));
    return new Client(new Servers(connections), options).connected();
  }
}
