// Orders at a constant rate: an open loop, so a slow answer does not hold back the next order as it would in `make bench`.
//
//   k6 run loadtest/k6/decide.js -e TARGET=127.0.0.1:7001 -e RATE=500 -e DURATION=30s
//
// Fails when an order gets no decision, when the p99 exceeds the deadline, or when k6 itself could not keep up.
import { check } from 'k6';
import { Counter } from 'k6/metrics';
import exec from 'k6/execution';
import grpc from 'k6/net/grpc';

const TARGET = __ENV.TARGET || '127.0.0.1:7001';
const RATE = Number(__ENV.RATE || 500); // orders a second
const DURATION = __ENV.DURATION || '30s';
const DEADLINE_MS = Number(__ENV.DEADLINE_MS || 100);
const INSTRUMENTS = (__ENV.INSTRUMENTS || 'BTCUSDT.BINANCE,ETHUSDT.BINANCE').split(',');
const STRATEGIES = ['execution-twap', 'momentum', 'mean-reversion', 'market-making'];
const SIDES = ['SIDE_BUY', 'SIDE_SELL'];
const SOURCES = ['PRIMARY', 'SECONDARY', 'CACHED_SCORE', 'RULES', 'NONE'];

export const options = {
  scenarios: {
    orders: {
      executor: 'constant-arrival-rate',
      rate: RATE,
      timeUnit: '1s',
      duration: DURATION,
      preAllocatedVUs: 50,
      maxVUs: 500,
    },
  },
  summaryTrendStats: ['min', 'med', 'p(90)', 'p(99)', 'p(99.9)', 'max'],
  thresholds: {
    decisions: ['count>0'], // without a connection nothing is checked
    checks: ['rate==1'],
    dropped_iterations: ['count==0'],
    grpc_req_duration: [`p(99)<${DEADLINE_MS}`],
    // Always true; a threshold is what makes k6 show a tag in its summary.
    ...Object.fromEntries(SOURCES.map((source) => [`decisions{source:SOURCE_${source}}`, ['count>=0']])),
  },
};

const decisions = new Counter('decisions'); // tagged with action and source
const client = new grpc.Client();
client.load(['../../proto'], 'pretrade/decision/v1/decision.proto');

let connected = false; // one connection for each virtual user

function pick(values) {
  return values[Math.floor(Math.random() * values.length)];
}

// A market order: a limit price would have to follow the market.
function order() {
  const lognormal = Math.exp(0.8 * Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()));
  return {
    order_ref: `k6-${exec.scenario.iterationInTest}`,
    instrument: pick(INSTRUMENTS),
    side: pick(SIDES),
    quantity: Number((0.05 * lognormal).toPrecision(4)),
    strategy: pick(STRATEGIES),
  };
}

export default function () {
  if (!connected) {
    client.connect(TARGET, { plaintext: true });
    connected = true;
  }
  const request = { order: order() };
  const response = client.invoke('pretrade.decision.v1.DecisionService/Decide', request, {
    timeout: `${DEADLINE_MS}ms`,
  });
  const decided = check(response, {
    'status is OK': (r) => r.status === grpc.StatusOK,
    'the decision is about this order': (r) =>
      r.status === grpc.StatusOK && r.message.decision.orderRef === request.order.order_ref,
  });
  if (decided) {
    const { action, source } = response.message.decision;
    decisions.add(1, { action, source });
  }
}
