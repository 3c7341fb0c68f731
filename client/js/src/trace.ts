/** The W3C trace context of a call. */

/** The trace that a call belongs to. */
export interface Trace {
  /** W3C trace context; absent: that of OpenTelemetry's active span, where the program uses OpenTelemetry. */
  readonly traceparent?: string | undefined;
  /** What vendors add to that `traceparent`. */
  readonly tracestate?: string | undefined;
}

/** What goes with a call, besides its token. */
export type Headers = Readonly<Record<string, string>>;

/** What this needs of what OpenTelemetry's API keeps where all versions of a page or program find it. */
interface OpenTelemetry {
  readonly context?: { active(): unknown };
  readonly propagation?: {
    inject(context: unknown, carrier: Record<string, string>, setter: { set: typeof setIn }): void;
  };
}

/**
 * Where `@opentelemetry/api` 1.x registers what a program has set up. To import it would make it a dependency.
 *
 * Source: https://github.com/open-telemetry/opentelemetry-js/blob/main/api/src/internal/global-utils.ts.
 */
const REGISTERED = Symbol.for("opentelemetry.js.api.1");
/** No others, such as baggage: a server need not allow them to pages of another site. */
const NAMES: ReadonlySet<string> = new Set(["traceparent", "tracestate"]);
const NONE: Headers = {};

/** The trace context as headers: the one given, that of the headers given, or that of OpenTelemetry. */
export function traceOf({ traceparent, tracestate, headers = NONE }: Trace & { headers?: Headers | undefined }): Headers {
  if (traceparent !== undefined) {
    return tracestate === undefined ? { traceparent } : { traceparent, tracestate };
  }
  const registered = (globalThis as Record<symbol, unknown>)[REGISTERED] as OpenTelemetry | undefined;
  if (registered?.context === undefined || registered.propagation === undefined || "traceparent" in headers) {
    return NONE;
  }
  const carrier: Record<string, string> = {};
  registered.propagation.inject(registered.context.active(), carrier, { set: setIn });
  return carrier;
}

/** True if both are the same. */
export function isSameTrace(one: Headers, other: Headers): boolean {
  return one["traceparent"] === other["traceparent"] && one["tracestate"] === other["tracestate"];
}

function setIn(carrier: Record<string, string>, name: string, value: string): void {
  if (NAMES.has(name.toLowerCase())) {
    carrier[name.toLowerCase()] = value;
  }
}
