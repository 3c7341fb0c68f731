// Calls every way of the decision service once and prints what came back as one JSON object.
// node caller.js HOST:PORT FOLDER_OF_PROTO_FILES
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const [target, protos] = process.argv.slice(2);
const definition = loader.loadSync('pretrade/decision/v1/decision.proto', {
  includeDirs: [protos], keepCase: true, enums: String,
});
const { DecisionService } = grpc.loadPackageDefinition(definition).pretrade.decision.v1;
const client = new DecisionService(target, grpc.credentials.createInsecure());
const order = (ref, changes) => ({
  order_ref: ref, instrument: 'BTCUSDT.SIM', side: 'SIDE_BUY', quantity: 1, strategy: 'test', ...changes,
});
const deadline = () => ({ deadline: Date.now() + 2000 });
const unary = (method, request) => new Promise((resolve) => {
  client[method](request, new grpc.Metadata(), deadline(), (error, answer) => resolve(error ?? answer));
});

async function main() {
  const decided = await unary('Decide', { order: order('one') });
  const refused = await unary('Decide', { order: order('two', { side: 'SIDE_UNSPECIFIED' }) });
  const batch = await unary('DecideBatch', { orders: [order('a'), order('b', { quantity: -1 }), order('c')] });
  const streamed = await new Promise((resolve, reject) => {
    const refs = [];
    const stream = client.DecideStream(new grpc.Metadata(), deadline());
    stream.on('data', (answer) => refs.push(answer.result.order_ref));
    stream.on('error', reject);
    stream.on('status', (status) => resolve({ refs, code: status.code }));
    for (let i = 0; i < 10; i += 1) stream.write({ order: order(`s${i}`) });
    stream.end();
  });
  console.log(JSON.stringify({
    decided: decided.decision.order_ref,
    refused: { code: refused.code, details: refused.metadata.get('grpc-status-details-bin').length },
    batch: batch.results.map((result) => [result.order_ref, result.outcome ?? Object.keys(result).pop()]),
    streamed,
  }));
  client.close();
}

main();
