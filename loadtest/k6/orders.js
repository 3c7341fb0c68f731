// What the scenarios share: where the server is, the flow of orders, and what is counted.
import { check } from 'k6';
import { Counter } from 'k6/metrics';
import exec from 'k6/execution';
import grpc from 'k6/net/grpc';

export const TARGET = __ENV.TARGET || '127.0.0.1:7001';
export const RATE = Number(__ENV.RATE || 500); // orders a second
export const SECONDS = seconds(__ENV.DURATION || '30s');
export const DEADLINE_MS = Number(__ENV.DEADLINE_MS || 100);
export const ANSWERED = Number(__ENV.ANSWERED || 1); // share of the orders that must get a decision
const INSTRUMENTS = (__ENV.INSTRUMENTS || 'BTCUSDT.BINANCE,ETHUSDT.BINANCE').split(',');
const TLS = Boolean(__ENV.TLS); // TLS=1: the server's certificate is one that this machine believes
const TOKEN = __ENV.TOKEN || ''; // bearer token
export const SOURCES = ['PRIMARY', 'SECONDARY', 'EMBEDDED', 'CANARY', 'CACHED_SCORE', 'RULES', 'NONE'];
const SIDES = ['SIDE_BUY', 'SIDE_SELL'];
const STRATEGIES = JSON.parse(open('../generators/strategies.json')); // orders.py says what its fields mean
const WEIGHT = STRATEGIES.reduce((sum, strategy) => sum + strategy.weight, 0);
const SERVICE = 'pretrade.decision.v1.DecisionService';

export const TREND_STATS = ['min', 'med', 'p(90)', 'p(99)', 'p(99.9)', 'max'];
export const SHOWN = ['count>=0']; // always true: a threshold is what makes k6 show a tag in its summary
export const decisions = new Counter('decisions'); // tagged with action and source
export const failures = new Counter('failures'); // orders without a decision, tagged with the gRPC status
const STATUSES = { 4: 'DeadlineExceeded', 8: 'ResourceExhausted', 14: 'Unavailable' }; // as k6 calls them
export const FAILURES = Object.fromEntries(
  Object.values(STATUSES).map((status) => [`failures{status:${status}}`, SHOWN]),
);

const client = new grpc.Client();
client.load(['../../proto'], 'pretrade/decision/v1/decision.proto');
let connected = false; // one connection for each virtual user
const parents = {}; // by strategy: the parent order that this virtual user works

export function seconds(text) {
  const match = /^(\d+(?:\.\d+)?)(s|m|h)$/.exec(text);
  if (!match) throw new Error(`DURATION must be like 30s, 5m or 1h, not ${text}`);
  return Number(match[1]) * { s: 1, m: 60, h: 3600 }[match[2]];
}

export function connection() {
  if (!connected) {
    client.connect(TARGET, { plaintext: !TLS });
    connected = true;
  }
  return client;
}

export function parameters(timeoutMs) {
  return { timeout: `${timeoutMs}ms`, metadata: TOKEN ? { authorization: `Bearer ${TOKEN}` } : {} };
}

export function method(name) {
  return `${SERVICE}/${name}`;
}

// The next order: a slice of a parent order, as in orders.py. A market order: a limit would have to follow the market.
export function order(number) {
  const strategy = strategyOf(WEIGHT * Math.random());
  let parent = parents[strategy.name];
  if (!parent || parent.slices === 0) {
    parent = parents[strategy.name] = {
      slices: strategy.slices === 1 ? 1 : 1 + Math.floor(Math.log(1 - Math.random()) / Math.log(1 - 1 / strategy.slices)),
      instrument: pick(INSTRUMENTS),
      side: pick(SIDES),
      quantity: 0.05 * lognormal(0.8),
      reduce_only: Math.random() < strategy.reduce_only_share,
    };
  }
  parent.slices -= 1;
  return {
    order_ref: `k6-${exec.scenario.name}-${number}`,
    instrument: parent.instrument,
    side: parent.side,
    quantity: Number((parent.quantity * lognormal(0.1)).toPrecision(4)),
    strategy: strategy.name,
    reduce_only: parent.reduce_only,
  };
}

// Counts one order's outcome; every order is one check.
export function count(sent, decision, status) {
  const right = check(decision, {
    'the order got its decision': (answer) => Boolean(answer) && answer.orderRef === sent.order_ref,
  });
  if (right) {
    decisions.add(1, { action: decision.action, source: decision.source });
  } else {
    const name = STATUSES[status] || String(status); // a number in the results of baskets and streams
    failures.add(1, { status: status === grpc.StatusOK ? 'WRONG_REPLY' : name });
  }
}

function strategyOf(weight) {
  let left = weight;
  return STRATEGIES.find((strategy) => (left -= strategy.weight) < 0) || STRATEGIES[0];
}

function pick(values) {
  return values[Math.floor(Math.random() * values.length)];
}

function lognormal(sigma) {
  return Math.exp(sigma * Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()));
}
