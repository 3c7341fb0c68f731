/** What a caller shows to a server, and whom it believes. */

import { readFileSync } from "node:fs";

import { credentials, type ChannelCredentials } from "@grpc/grpc-js";

import { invalid, PretradeError } from "./errors.js";
import { isThisMachine } from "./local.js";

/** Files and words that stand for a caller. */
export interface Credentials {
  /** File of the authorities of servers, in PEM; with it every connection is TLS. */
  readonly ca?: string | undefined;
  /** File of the caller's own certificate, in PEM. */
  readonly certificate?: string | undefined;
  /** File of that certificate's private key. */
  readonly key?: string | undefined;
  /** The name in the server's certificate, where it is not the host's. */
  readonly tlsName?: string | undefined;
  /** File of the caller's token; read for every call, so that it may be replaced. */
  readonly tokenFile?: string | undefined;
  /** The token itself, where it is in no file. */
  readonly token?: string | undefined;
}

/** Credentials that the environment names, in the variables that the Python client reads as well. */
export function credentialsFromEnvironment(environment = process.env): Credentials {
  return {
    ca: environment["PRETRADE_CLIENT_CA"] || undefined,
    certificate: environment["PRETRADE_CLIENT_CERTIFICATE"] || undefined,
    key: environment["PRETRADE_CLIENT_KEY"] || undefined,
    tlsName: environment["PRETRADE_CLIENT_TLS_NAME"] || undefined,
    tokenFile: environment["PRETRADE_CLIENT_TOKEN_FILE"] || undefined,
    token: environment["PRETRADE_CLIENT_TOKEN"] || undefined,
  };
}

/**
 * The channel's side of the credentials.
 *
 * @throws PretradeError - A token would travel over a network in the open.
 */
export function channelCredentials(given: Credentials, server: string): ChannelCredentials {
  if (given.ca === undefined) {
    if ((given.token !== undefined || given.tokenFile !== undefined) && !isLocal(server)) {
      throw invalid("TOKEN_IN_THE_OPEN", "ca", `a token is not sent to ${server} without TLS: name the authority, ca`);
    }
    return credentials.createInsecure();
  }
  const read = (path: string | undefined) => (path === undefined ? null : readFileSync(path));
  return credentials.createSsl(read(given.ca), read(given.key), read(given.certificate));
}

/**
 * The value of the header `authorization`; undefined without a token.
 *
 * @throws PretradeError - The token's file cannot be read.
 */
export function authorization(given: Credentials): string | undefined {
  const token = given.token ?? (given.tokenFile === undefined ? undefined : tokenIn(given.tokenFile));
  return token === undefined ? undefined : `Bearer ${token}`;
}

function tokenIn(path: string): string {
  try {
    return readFileSync(path, "utf8").trim();
  } catch (error) {
    const words = `the token's file cannot be read: ${(error as Error).message}`;
    throw new PretradeError("UNAUTHENTICATED", words, { reason: "TOKEN_FILE", field: "tokenFile" });
  }
}

/** True for an address that only this machine can reach. */
export function isLocal(server: string): boolean {
  return server.startsWith("unix:") || isThisMachine(server.slice(0, server.lastIndexOf(":")));
}
