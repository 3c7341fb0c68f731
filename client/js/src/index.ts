/** The client for Node, by gRPC. */

import { addressesOf, Caller, type CallerOptions } from "./caller.js";
import type { Credentials } from "./credentials.js";
import { GrpcConnection } from "./grpc.js";
import { Servers } from "./servers.js";
import { DecisionStream } from "./stream.js";

export type { CallOptions, DecideOptions } from "./caller.js";
export type { Health } from "./connection.js";
export { type Credentials, credentialsFromEnvironment } from "./credentials.js";
export { Decision, type Result } from "./decision.js";
export { type ErrorFacts, PretradeError } from "./errors.js";
export type { OrderFields } from "./order.js";
export type { SharedCalls, SharedOptions } from "./shared.js";
export type { Status } from "./status.js";
export type { DecisionStream, StreamOptions } from "./stream.js";

/** How a client calls. */
export interface ClientOptions extends CallerOptions, Credentials {}

/** Asks for decisions by gRPC. One client, and its one connection to a server, is enough for a whole program. */
export class Client extends Caller<GrpcConnection> {
  /**
   * Connects to a server.
   *
   * @param servers - `host:port`, or several, best first. The first one that is up is asked. A server on another
   * machine does not remember idempotency keys: an order that was lost on the way back from one may be decided by the
   * other again.
   * @throws PretradeError - None could be reached within `connectMs`, or the credentials cannot be used.
   */
  static async connect(servers: string | readonly string[], options: ClientOptions = {}): Promise<Client> {
    const addresses = addressesOf(servers, "host:port");
    const connections = addresses.map((address) => new GrpcConnection(address, options));
    return new Client(new Servers(connections), options).connected();
  }

  /**
   * Opens a stream, for many orders at a time.
   *
   * @param headers - Metadata of the stream.
   */
  stream(headers: Readonly<Record<string, string>> = {}): DecisionStream {
    return new DecisionStream(this.servers, (options) => this.timeoutOf(options), headers);
  }
}
