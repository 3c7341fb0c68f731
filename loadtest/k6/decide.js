// Orders one by one, in an open loop: a slow answer does not hold back the next order as it would in `make bench`.
//
//   k6 run loadtest/k6/decide.js -e TARGET=127.0.0.1:7001 -e RATE=500 -e DURATION=30s
//   k6 run loadtest/k6/decide.js -e PROFILE=ramp    -e RATE=5000 -e STEPS=5    up to RATE in steps, each judged by itself
//   k6 run loadtest/k6/decide.js -e PROFILE=burst   -e RATE=500 -e TIMES=10    a market open: ten times as much at once
//   k6 run loadtest/k6/decide.js -e PROFILE=failure -e RATE=500 -e ADMIN=127.0.0.1:7002   the primary is lost and comes back
//   k6 run loadtest/k6/decide.js -e RATE=300 -e DURATION=30m    a soak; `pretrade soak` watches the server, too
//
// Fails when an order gets no decision, when the p99 exceeds the deadline, or when k6 itself could not keep up; the first
// seconds, in which everybody connects, are not judged. A ramp only shows. A burst is judged before and after it; in
// between orders may be refused. ANSWERED=0.99 lets one in a hundred go without a decision.
import grpc from 'k6/net/grpc';
import exec from 'k6/execution';
import { Counter } from 'k6/metrics';
import * as orders from './orders.js';

const { RATE, SECONDS, DEADLINE_MS, ANSWERED, SOURCES, SHOWN, FAILURES } = orders;
const PROFILE = __ENV.PROFILE || 'constant';
const STEPS = Number(__ENV.STEPS || 5);
const WARM_UP = Number(__ENV.WARM_UP || 3); // seconds before the scenario, not judged: every virtual user connects
const TIMES = Number(__ENV.TIMES || 10);
const ADMIN = __ENV.ADMIN || ''; // HOST:PORT of the admin service; without it somebody else takes the primary away
const ADMIN_TOKEN = __ENV.ADMIN_TOKEN || '';
const REPLICA = __ENV.REPLICA || 'primary';

const steered = new Counter('steered'); // changes that the server made for us

// A constant rate, or stages of one, from an instant on.
function arrivals(rate, seconds, startSeconds = 0, stages = null) {
  const inFlight = Math.ceil((rate * DEADLINE_MS) / 1000);
  return {
    executor: stages ? 'ramping-arrival-rate' : 'constant-arrival-rate',
    ...(stages ? { startRate: rate, stages } : { rate, duration: `${seconds}s` }),
    timeUnit: '1s',
    startTime: `${WARM_UP + startSeconds}s`,
    preAllocatedVUs: Math.min(200, Math.max(20, inFlight)),
    maxVUs: Math.min(1000, Math.max(200, 2 * inFlight)),
    gracefulStop: `${Math.ceil(DEADLINE_MS / 1000)}s`,
  };
}

const third = SECONDS / 3;
const PROFILES = {
  constant: () => ({ orders: arrivals(RATE, SECONDS) }),
  ramp: () =>
    Object.fromEntries(
      Array.from({ length: STEPS }, (_, step) => {
        const rate = Math.max(1, Math.round((RATE * (step + 1)) / STEPS));
        return [`at_${rate}`, arrivals(rate, SECONDS / STEPS, (step * SECONDS) / STEPS)];
      }),
    ),
  burst: () => ({
    before: arrivals(RATE, third),
    open: arrivals(RATE * TIMES, third, third, [
      { target: RATE * TIMES, duration: `${third / 3}s` },
      { target: RATE, duration: `${(2 * third) / 3}s` },
    ]),
    after: arrivals(RATE, third, 2 * third),
  }),
  failure: () => ({
    before: arrivals(RATE, third),
    during: arrivals(RATE, third, third),
    after: arrivals(RATE, third, 2 * third),
    operator: {
      executor: 'per-vu-iterations',
      vus: 1,
      iterations: 1,
      startTime: `${WARM_UP + third}s`,
      exec: 'operator',
    },
  }),
};
if (!(PROFILE in PROFILES)) throw new Error(`PROFILE must be one of ${Object.keys(PROFILES).join(', ')}`);
const scenarios = PROFILES[PROFILE]();
if (WARM_UP) scenarios.warm_up = arrivals(PROFILE === 'ramp' ? RATE / STEPS : RATE, WARM_UP, -WARM_UP);
const phases = Object.keys(scenarios).filter((name) => !['operator', 'warm_up'].includes(name));
const judged = { ramp: [], burst: ['before', 'after'] }[PROFILE] || phases;

function thresholds() {
  const found = { decisions: ['count>0'] }; // without a connection nothing is checked
  for (const phase of phases) {
    const strict = judged.includes(phase);
    const tag = `scenario:${phase}`;
    found[`checks{${tag}}`] = [strict ? `rate>=${ANSWERED}` : 'rate>=0'];
    found[`grpc_req_duration{${tag}}`] = [strict ? `p(99)<${DEADLINE_MS}` : 'p(99)>=0'];
    found[`dropped_iterations{${tag}}`] = [strict ? 'count==0' : 'count>=0'];
    if (phases.length > 1) for (const source of SOURCES) found[`decisions{${tag},source:SOURCE_${source}}`] = SHOWN;
  }
  for (const source of SOURCES) found[`decisions{source:SOURCE_${source}}`] = SHOWN;
  Object.assign(found, FAILURES);
  if (PROFILE === 'failure' && ADMIN) found.steered = ['count==1'];
  return found;
}

export const options = { scenarios, summaryTrendStats: orders.TREND_STATS, thresholds: thresholds() };

export default function () {
  const sent = orders.order(exec.scenario.iterationInTest);
  const response = orders
    .connection()
    .invoke(orders.method('Decide'), { order: sent }, orders.parameters(DEADLINE_MS));
  orders.count(sent, response.status === grpc.StatusOK && response.message.decision, response.status);
}

const admin = new grpc.Client();
if (ADMIN) admin.load(['../../proto'], 'pretrade/admin/v1/admin.proto');

// Forces the replica's breaker open for a third of the run; the server itself reverts that.
export function operator() {
  if (!ADMIN) {
    console.log(`now take ${REPLICA} away for ${third} s: kill its process or its pod`);
    return;
  }
  admin.connect(ADMIN, { plaintext: !__ENV.TLS });
  const request = {
    replica: REPLICA,
    mode: 'BREAKER_MODE_FORCED_OPEN',
    expires_in: `${third.toFixed(3)}s`,
    author: 'k6',
    reason: 'load scenario: a replica is lost',
  };
  const metadata = ADMIN_TOKEN ? { authorization: `Bearer ${ADMIN_TOKEN}` } : {};
  const response = admin.invoke('pretrade.admin.v1.AdminService/SetBreaker', request, { timeout: '5s', metadata });
  if (response.status === grpc.StatusOK) {
    steered.add(1);
  } else {
    console.error(`${REPLICA} was not taken away: ${response.status} ${response.error && response.error.message}`);
  }
  admin.close();
}
