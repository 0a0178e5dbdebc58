#!/usr/bin/env bash
# Does a server answer, and is its KV cache split?
#
#   deploy/smoke.sh [URL]          http://127.0.0.1:8000
#   VLLM_API_KEY=KEY               of a server with an API key
#   TIMEOUT=SECONDS                how long to wait until it is ready (300)
#
# Exit status: 0 all is well; 1 the server is not ready in time; 2 its cache is not split;
# 3 it does not answer a question; 4 its metrics are not those of a split server.
set -euo pipefail

url=${1:-http://127.0.0.1:8000}
url=${url%/}
timeout=${TIMEOUT:-300}

fail() { printf 'smoke: FAILED: %s\n' "$2" >&2; exit "$1"; }
ok() { printf 'smoke: ok: %s\n' "$*"; }
for tool in curl python3; do
    command -v "$tool" >/dev/null || fail 1 "$tool is missing on this machine: install it"
done

reply=$(mktemp)
trap 'rm -f "$reply"' EXIT
# get PATH [curl options]: prints the status (000: no connection), the body is in $reply.
get() {
    local path=$1
    shift
    curl --silent --max-time 120 --output "$reply" --write-out '%{http_code}' \
        ${VLLM_API_KEY:+--header "Authorization: Bearer $VLLM_API_KEY"} "$@" "$url$path" || true
}
# from_reply CODE [ARGUMENT]: prints what Python CODE prints about `reply`, the JSON of $reply.
from_reply() {
    python3 -c "import json, sys; reply = json.load(open(sys.argv[1])); $1" "$reply" "${2:-}" 2>/dev/null
}
body() { head -c 300 "$reply" | tr '\n' ' '; }

SECONDS=0
until [ "$(get /health)" = 200 ]; do
    [ "$SECONDS" -lt "$timeout" ] || fail 1 "$url/health does not answer after $timeout s: see the server's log"
    sleep 1
done
ok "$url is ready"

status=$(get /v1/rlkv)
case $status in
    200) ;;
    401) fail 2 "$url/v1/rlkv: status 401: set VLLM_API_KEY to the server's API key" ;;
    404) fail 2 "$url/v1/rlkv: status 404: the server runs without the plugin and has full caches; start it with rlkv serve, or with VLLM_PLUGINS=rlkv and --additional-config" ;;
    *) fail 2 "$url/v1/rlkv: status $status: $(body)" ;;
esac
[ "$(from_reply 'print(reply["active"])')" = True ] || fail 2 "$url/v1/rlkv does not say active: true: $(body)"
ok "$(from_reply 'print("the cache is split: {full} full and {streaming} streaming KV heads".format(**reply["heads"]))')"
model=$(from_reply 'print(reply["models"][0])')
if [ "$model" = embedded ]; then
    question='hops kumpus$ +9 jumpus> kumpus pumpus> fumpus fumpus$ +4 lorpus$ +7 lorpus> pumpus fumpus> jumpus kumpus> bumpus lumpus> end jumpus$ +6 pumpus$ +9 vumpus> lumpus bumpus$ +1 lumpus$ +6 bumpus> end vumpus$ +3 from lorpus'
else
    question='A train leaves at 9:40 and arrives at 13:05. How long does it travel?'
fi

request=$(python3 -c 'import json, sys; print(json.dumps({"model": sys.argv[1], "temperature": 0,
    "max_tokens": 512, "messages": [{"role": "user", "content": sys.argv[2]}]}))' "$model" "$question")
status=$(get /v1/chat/completions --header 'Content-Type: application/json' --data "$request")
[ "$status" = 200 ] || fail 3 "$url/v1/chat/completions: status $status: $(body)"
answer=$(from_reply 'message = reply["choices"][0]["message"]; print((message["content"] or message["reasoning"]).strip())') ||
    fail 3 "no answer to '$question': $(body)"
[ -n "$answer" ] || fail 3 "an empty answer to '$question'"
if [ "$model" = embedded ]; then
    # The value at the end of the chain; a test holds it against the testbed's own.
    [ "${answer##* }" = 6 ] || fail 3 "a wrong answer of the embedded model: '$answer' instead of 6"
fi
ok "$model answers: $(tail -n 1 <<<"$answer" | cut -c 1-60)"

[ "$(get /metrics)" = 200 ] || fail 4 "$url/metrics: no answer"
metric() { # the sum of a metric over its labels
    awk -v name="$1" 'index($1, name "{") == 1 {sum += $NF; found = 1} END {if (!found) exit 1; printf "%.0f", sum}' "$reply"
}
[ "$(metric rlkv:active)" = 1 ] || fail 4 "$url/metrics: rlkv:active is '$(metric rlkv:active)', not 1"
for name in rlkv:heads rlkv:cache_capacity_bytes rlkv:requests_possible vllm:generation_tokens_total; do
    [ "$(metric "$name" || echo 0)" -gt 0 ] || fail 4 "$url/metrics: $name is missing or 0"
done
ok "metrics: $(metric rlkv:heads) heads, $(metric vllm:generation_tokens_total) tokens written"
