// The W3C trace context that goes with calls; OpenTelemetry is real.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import { context, propagation, trace, TraceFlags } from "@opentelemetry/api";
import { AsyncLocalStorageContextManager } from "@opentelemetry/context-async-hooks";
import { CompositePropagator, W3CBaggagePropagator, W3CTraceContextPropagator, TraceState } from "@opentelemetry/core";

import { asking, order, start, STREAM, WAYS } from "./ways.js";

const TRACEPARENT = `00-${"1".repeat(32)}-${"2".repeat(16)}-01`;
const span = (number) =>
  trace.setSpanContext(context.active(), {
    traceId: `${number}`.repeat(32),
    spanId: "2".repeat(16),
    traceFlags: TraceFlags.SAMPLED,
    traceState: new TraceState("vendor=1"),
  });
const shown = ({ headers }) => headers.map(({ traceparent, tracestate, baggage }) => [traceparent, tracestate, baggage]);

before(() => {
  context.setGlobalContextManager(new AsyncLocalStorageContextManager().enable());
  const propagators = [new W3CTraceContextPropagator(), new W3CBaggagePropagator()];
  propagation.setGlobalPropagator(new CompositePropagator({ propagators }));
});
after(() => {
  context.disable();
  propagation.disable();
});

for (const way of Object.keys(WAYS).filter((name) => name !== STREAM)) {
  test(`a call has the trace that it was given, or that of the active span, by ${way}`, async (t) => {
    const server = await start(t);
    const ask = await asking(t, way, [server]);
    await ask(order);
    await context.with(span(1), () => ask(order));
    await context.with(span(3), () => ask(order, { traceparent: TRACEPARENT, tracestate: "mine=1" }));
    const baggage = propagation.createBaggage({ user: { value: "me" } });
    await context.with(propagation.setBaggage(span(1), baggage), () => ask(order));
    assert.deepEqual(shown(server), [
      [undefined, undefined, undefined],
      [TRACEPARENT, "vendor=1", undefined],
      [TRACEPARENT, "mine=1", undefined],
      [TRACEPARENT, "vendor=1", undefined],
    ]);
  });

  if (!way.startsWith("shared")) {
    test(`a trace among the headers of a call is that of the call, by ${way}`, async (t) => {
      const server = await start(t);
      const ask = await asking(t, way, [server]);
      await context.with(span(3), () => ask(order, { headers: { traceparent: TRACEPARENT } }));
      assert.deepEqual(shown(server), [[TRACEPARENT, undefined, undefined]]);
    });
    continue;
  }

  test(`a call that is shared has a trace where that is one for all, and none otherwise, by ${way}`, async (t) => {
    const server = await start(t);
    const ask = await asking(t, way, [server]);
    await context.with(span(1), () => Promise.all([ask(order), ask(order)]));
    await Promise.all([context.with(span(1), () => ask(order)), ask(order)]);
    await Promise.all([1, 3].map((number) => context.with(span(number), () => ask(order))));
    const none = [undefined, undefined, undefined];
    assert.deepEqual(shown(server), [[TRACEPARENT, "vendor=1", undefined], none, none]);
  });
}
