#!/bin/sh
# One order again and again, as fast as the server answers (a closed loop), by h2load: it takes less of the machine than
# any other generator here, and measures the most decisions a second.
#
#   loadtest/h2load.sh 127.0.0.1:7001 64 30 http://127.0.0.1:7003/metrics
#
# Arguments: HOST:PORT, calls under way at once, seconds, and the server's metrics. h2load takes every HTTP 200 for a
# success, and gRPC says what went wrong in a trailer that it does not read: so the server is asked how many calls got no
# decision. Debian: nghttp2-client. INSTRUMENT names what is traded, PYTHON an interpreter that has this package.
set -eu
target=$1 callers=${2:-64} seconds=${3:-30} metrics=${4:-}
connections=$((callers < 16 ? callers : 16))
body=$(mktemp)
trap 'rm -f "$body"' EXIT
"${PYTHON:-python3}" -m loadtest.generators.orders "${INSTRUMENT:-BTCUSDT.BINANCE}" >"$body"

counted() { curl -fsS "$metrics" | awk -v name="$1" '$1 ~ "^"name"(\\{|$)" { sum += $2 } END { print sum + 0 }'; }
if [ -n "$metrics" ]; then
  errors=$(counted pretrade_errors_total) decisions=$(counted pretrade_decisions_total)
fi
h2load -c "$connections" -m $((callers / connections)) -D "$seconds" -d "$body" \
  -H 'content-type: application/grpc' -H 'te: trailers' "http://$target/pretrade.decision.v1.DecisionService/Decide"
if [ -n "$metrics" ]; then
  errors=$(($(counted pretrade_errors_total) - errors)) decisions=$(($(counted pretrade_decisions_total) - decisions))
  echo "by the server's count: $decisions decisions, $((decisions / seconds)) a second; $errors calls without one"
  [ "$errors" -eq 0 ]
fi
