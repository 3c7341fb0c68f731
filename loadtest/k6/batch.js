// Baskets of orders, `DecideBatch`, in an open loop: RATE orders a second, BATCH of them in each call.
//
//   k6 run loadtest/k6/batch.js -e TARGET=127.0.0.1:7001 -e RATE=3200 -e BATCH=64 -e DURATION=30s
//
// Fails when an order gets no decision, when the p99 of the calls exceeds the deadline, or when k6 could not keep up.
import grpc from 'k6/net/grpc';
import exec from 'k6/execution';
import * as orders from './orders.js';

const { RATE, SECONDS, DEADLINE_MS, ANSWERED, SOURCES, SHOWN, FAILURES } = orders;
const BATCH = Number(__ENV.BATCH || 64);

export const options = {
  scenarios: {
    baskets: {
      executor: 'constant-arrival-rate',
      rate: RATE, // in BATCH seconds: RATE / BATCH calls a second
      timeUnit: `${BATCH}s`,
      duration: `${SECONDS}s`,
      preAllocatedVUs: 20,
      maxVUs: 200,
    },
  },
  summaryTrendStats: orders.TREND_STATS,
  thresholds: {
    decisions: ['count>0'],
    checks: [`rate>=${ANSWERED}`],
    dropped_iterations: ['count==0'],
    grpc_req_duration: [`p(99)<${DEADLINE_MS}`],
    ...Object.fromEntries(SOURCES.map((source) => [`decisions{source:SOURCE_${source}}`, SHOWN])),
    ...FAILURES,
  },
};

export default function () {
  const first = exec.scenario.iterationInTest * BATCH;
  const sent = Array.from({ length: BATCH }, (_, index) => orders.order(first + index));
  const response = orders
    .connection()
    .invoke(orders.method('DecideBatch'), { orders: sent }, orders.parameters(DEADLINE_MS));
  const results = response.status === grpc.StatusOK ? response.message.results : [];
  sent.forEach((one, index) => {
    const result = results[index] || {};
    orders.count(one, result.decision, result.error ? result.error.code : response.status);
  });
}
