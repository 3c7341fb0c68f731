// Orders over long-lived streams, `DecideStream`, in an open loop: RATE orders a second over STREAMS streams.
//
//   k6 run loadtest/k6/stream.js -e TARGET=127.0.0.1:7001 -e RATE=1000 -e STREAMS=4 -e DURATION=30s
//
// Fails when an order gets no decision in its time, or when the p99 of `order_duration` exceeds the deadline. That is
// counted from the instant at which an order was due, so that a tick that comes late hides nothing.
import { setInterval, clearInterval, setTimeout, clearTimeout } from 'k6/timers';
import { Trend } from 'k6/metrics';
import exec from 'k6/execution';
import grpc from 'k6/net/grpc';
import * as orders from './orders.js';

const { RATE, SECONDS, DEADLINE_MS, ANSWERED, SOURCES, SHOWN, FAILURES } = orders;
const STREAMS = Number(__ENV.STREAMS || 4);
const TICK_MS = 2;
const duration = new Trend('order_duration', true);

export const options = {
  scenarios: {
    streams: {
      executor: 'per-vu-iterations',
      vus: STREAMS,
      iterations: 1,
      maxDuration: `${SECONDS + 30}s`,
    },
  },
  summaryTrendStats: orders.TREND_STATS,
  thresholds: {
    decisions: ['count>0'],
    checks: [`rate>=${ANSWERED}`],
    order_duration: [`p(99)<${DEADLINE_MS}`],
    ...Object.fromEntries(SOURCES.map((source) => [`decisions{source:SOURCE_${source}}`, SHOWN])),
    ...FAILURES,
  },
};

export default function () {
  const timeoutMs = 1000 * SECONDS + DEADLINE_MS + 10000;
  const stream = new grpc.Stream(orders.connection(), orders.method('DecideStream'), orders.parameters(timeoutMs));
  const total = Math.round((RATE / STREAMS) * SECONDS);
  const waiting = new Map(); // order_ref to the order and when it was due
  const began = Date.now();
  let written = 0;
  let giveUp = null; // ends the stream when the last answers do not come
  let status = 'NO_REPLY';

  stream.on('data', ({ result }) => {
    const found = waiting.get(result.orderRef);
    if (!found) return;
    waiting.delete(result.orderRef);
    if (result.decision) duration.add(Date.now() - found.due);
    orders.count(found.sent, result.decision, result.error && result.error.code);
    if (written === total && waiting.size === 0) stream.end();
  });
  stream.on('error', (error) => {
    status = error.code;
    finish();
  });
  stream.on('end', finish);

  function finish() {
    clearInterval(ticking);
    clearTimeout(giveUp);
    waiting.forEach(({ sent }) => orders.count(sent, null, status));
    waiting.clear();
  }

  const ticking = setInterval(() => {
    const due = Math.min(total, Math.floor(((Date.now() - began) * RATE) / STREAMS / 1000));
    for (; written < due; written += 1) {
      const sent = { ...orders.order(`${exec.vu.idInTest}-${written}`), timeout: `${(DEADLINE_MS / 1000).toFixed(6)}s` };
      waiting.set(sent.order_ref, { sent, due: began + (1000 * written * STREAMS) / RATE });
      stream.write({ order: sent });
    }
    if (written === total) {
      clearInterval(ticking);
      giveUp = setTimeout(() => stream.end(), 2 * DEADLINE_MS);
    }
  }, TICK_MS);
}
