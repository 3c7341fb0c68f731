// Orders at a constant rate for the benchmark, see k6.py, which writes the settings and reads the samples.
//
// k6's JavaScript has only a clock of milliseconds, but its samples carry the instant at which they were taken in
// microseconds: so a call is a sample when it begins and one when it is answered, and whoever reads them subtracts.
import { Counter } from 'k6/metrics';
import exec from 'k6/execution';
import grpc from 'k6/net/grpc';

const settings = JSON.parse(open(__ENV.SETTINGS));
const orders = JSON.parse(open(settings.orders)); // few: every virtual user has its own
const begun = new Counter('bench_begun');
const answered = new Counter('bench_answered'); // its value: decisions of the call
const client = new grpc.Client();
client.loadProtoset(settings.protoset);
const METHOD = `pretrade.decision.v1.DecisionService/${settings.method}`;

const arrivals = {
  executor: 'constant-arrival-rate',
  rate: settings.calls,
  timeUnit: `${settings.unit_ms}ms`,
  duration: `${settings.duration_ms}ms`,
  preAllocatedVUs: settings.vus,
  maxVUs: settings.vus,
  exec: 'call',
};
const one = { executor: 'per-vu-iterations', vus: 1, iterations: 1, exec: 'stream' };
export const options = { scenarios: { load: settings.method === 'DecideStream' ? one : arrivals } };

function order(n) {
  return { ...orders[n % orders.length], order_ref: `${settings.prefix}${n}` };
}

let connected = false; // one connection for each virtual user
function connect() {
  if (!connected) {
    client.connect(settings.target, { plaintext: true });
    connected = true;
  }
}

export function call() {
  const n = exec.scenario.iterationInTest;
  begun.add(1, { n });
  connect();
  const many = settings.method === 'DecideBatch';
  const first = n * settings.orders_per_call;
  const request = many
    ? { orders: Array.from({ length: settings.orders_per_call }, (_, i) => order(first + i)) }
    : { order: order(n) };
  const response = client.invoke(METHOD, request, { timeout: `${settings.deadline_ms}ms`, tags: { n } });
  const ok = response.status === grpc.StatusOK;
  const results = !ok ? [] : many ? response.message.results : [{ orderRef: request.order.order_ref, ...response.message }];
  const decided = results.filter((r, i) => r.decision && r.decision.orderRef === `${settings.prefix}${first + i}`);
  answered.add(decided.length, { n, status: Number(response.status) });
}

// One stream on which orders leave when they are due.
export function stream() {
  connect();
  const calling = new grpc.Stream(client, METHOD);
  const began = Date.now();
  let n = 0;
  calling.on('data', ({ result }) => {
    const status = result.decision ? 0 : result.error.code;
    answered.add(result.decision ? 1 : 0, { n: result.orderRef.slice(settings.prefix.length), status });
  });
  calling.on('error', (error) => console.error(`stream: ${error.code} ${error.message}`));
  const ticking = setInterval(() => {
    const elapsed = Math.min(Date.now() - began, settings.duration_ms);
    for (; n < (elapsed * settings.calls) / settings.unit_ms; n++) {
      begun.add(1, { n });
      calling.write({ order: { ...order(n), timeout: `${settings.deadline_ms / 1000}s` } });
    }
    if (elapsed === settings.duration_ms) {
      clearInterval(ticking);
      calling.end();
    }
  }, 1);
}
