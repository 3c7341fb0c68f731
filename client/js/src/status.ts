/** The names of gRPC's status codes. */

const NAMES = [
  "OK",
  "CANCELLED",
  "UNKNOWN",
  "INVALID_ARGUMENT",
  "DEADLINE_EXCEEDED",
  "NOT_FOUND",
  "ALREADY_EXISTS",
  "PERMISSION_DENIED",
  "RESOURCE_EXHAUSTED",
  "FAILED_PRECONDITION",
  "ABORTED",
  "OUT_OF_RANGE",
  "UNIMPLEMENTED",
  "INTERNAL",
  "UNAVAILABLE",
  "DATA_LOSS",
  "UNAUTHENTICATED",
] as const;

/** How a call ended, by the name of its gRPC status. */
export type Status = (typeof NAMES)[number];

/** The name of a status code. */
export function statusOf(code: number): Status {
  return NAMES[code] ?? "UNKNOWN";
}

/** True for the name of a status. */
export function isStatus(name: unknown): name is Status {
  return (NAMES as readonly unknown[]).includes(name);
}

/** The number of a status. */
export function codeOf(status: Status): number {
  return NAMES.indexOf(status);
}
