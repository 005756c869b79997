#!/usr/bin/env bash
#
# Ask one neuron a question with a known answer, loading the model first where it is not loaded.
#
# usage: scripts/validate-neuron.sh [host] [model] [quant] [tensor_parallel]
#
#   host             localhost
#   model            smollm2-135m-instruct, the embedded model
#   quant            Q4_1 for the embedded model, none for any other; an explicit empty argument
#                    leaves it out of the load: dense weights
#   tensor_parallel  1; the first so many devices, or those of NEURON_DEVICES
#
# environment: NEURON_PORT (13131), NEURON_DEVICES ("0,1"), NEURON_LOAD_TIMEOUT (3600 seconds, for
# the neuron's activation and for the load), NEURON_INFER_TIMEOUT (120 seconds).
#
# Status lines go to stderr, the neuron's raw JSON answer to stdout. Exit status 0 if the answer
# names Paris, else 1. Needs bash, curl and jq.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
  sed -n '3,/^set/{/^#/s/^# \?//p}' "$0"
  exit 0
fi

embedded=smollm2-135m-instruct
host=${1:-localhost}
model=${2:-$embedded}
if [[ $model == "$embedded" ]]; then quant=${3-Q4_1}; else quant=${3-}; fi
tensor_parallel=${4:-1}
url=http://$host:${NEURON_PORT:-13131}
load_timeout=${NEURON_LOAD_TIMEOUT:-3600}
infer_timeout=${NEURON_INFER_TIMEOUT:-120}
pauses=(0.2 0.3 0.5 1 2 2 2 2 2 10) # seconds between looks; the last one stays
status= # of the last answer of call
body=

say() { echo "[$host] $*" >&2; }
fail() { say "FAIL: $*"; exit 1; }

# Set status and body to what the neuron answers; status is 000 where it does not.
call() {
  local timeout=$1 path=$2 answer
  shift 2
  answer=$(curl -sS --noproxy '*' --max-time "$timeout" -w '\n%{http_code}' "$@" "$url$path" 2>&1) \
    || true
  status=${answer##*$'\n'}
  body=${answer%$'\n'*}
  if [[ ! $status =~ ^[0-9]{3}$ ]]; then status=000; fi
}

post() { call "$1" "$2" -H 'content-type: application/json' --data-binary "$3"; }

# Read a value from body, or fail where it is not what the neuron's API promises.
value() { jq -er "${@:2}" <<<"$body" 2>/dev/null || fail "$1 is not in the answer: $body"; }

# Run the function named second until it succeeds; give up after the first argument's seconds.
wait_until() {
  local deadline=$((SECONDS + $1)) look=0
  until "$2"; do
    if ((SECONDS >= deadline)); then fail "$3 within $1 s"; fi
    sleep "${pauses[look < ${#pauses[@]} ? look++ : -1]}"
  done
}

is_activated() {
  call 5 /health
  if [[ $status != 2* ]]; then fail "GET /health: $status $body"; fi
  local state
  state=$(value .activation.state .activation.state) || exit 1
  if [[ $state == ready ]]; then return 0; fi
  say "activation: $state, loading $(jq -r '.activation.in_progress // "nothing"' <<<"$body")"
  return 1
}

load_payload() {
  jq -cn --arg model "$model" --arg quant "$quant" --argjson ranks "$tensor_parallel" \
    --argjson devices "[${NEURON_DEVICES-}]" '
    {model_id: $model, harness: "torch",
     devices: (if $devices == [] then [range($ranks)] else $devices end)}
    + if $quant == "" then {} else {quant: $quant} end
    + if $ranks > 1 then {tensor_parallel: $ranks} else {} end'
}

ask_for_load() {
  say "loading ${model}${quant:+ ($quant)}"
  post 30 /models/load "$payload"
  if [[ $status != 200 && $status != 202 ]]; then fail "POST /models/load: $status $body"; fi
}

# One look at /models, and what has to be done about it: nothing, ask for the load, or wait.
requested=false
is_loaded() {
  call 5 /models
  if [[ $status != 200 ]]; then fail "GET /models: $status $body"; fi
  local entry state
  entry=$(jq -c --arg id "$model" 'map(select(.id == $id)) | first' <<<"$body" 2>/dev/null) \
    || fail "GET /models is not a list of models: $body"
  state=$(jq -r '.status // "absent"' <<<"$entry")
  case $state in
    loaded) return 0 ;;
    failed | absent)
      if $requested; then
        fail "$model is $state: $(jq -r '.failure // "no reason given"' <<<"$entry")"
      fi
      ask_for_load
      requested=true
      ;;
    *) say "$model is $state$(jq -r '.progress // {} | " \(.phase // "") \(.bytes_done // "")" +
         if (.bytes_total // 0) > 0 then " of \(.bytes_total) bytes" else "" end' <<<"$entry")" ;;
  esac
  return 1
}

ask() {
  local question='What is the capital of France? Answer with the name of the city only.' payload
  payload=$(jq -cn --arg model "$model" --arg question "$question" '
    {model: $model, messages: [{role: "user", content: $question}],
     temperature: 0, max_tokens: 256}')
  post "$infer_timeout" /v1/chat/completions "$payload"
  if [[ $status != 200 ]]; then fail "POST /v1/chat/completions: $status $body"; fi
}

for tool in curl jq; do
  command -v "$tool" >/dev/null || fail "needs $tool, which is not installed"
done
if [[ $host =~ ^[^:]+:[0-9]+$ ]]; then
  fail "the host goes without a port: NEURON_PORT=${host##*:} $0 ${host%:*}"
fi
for number in "$tensor_parallel" "$load_timeout" "$infer_timeout"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "not a positive number: $number"
done
payload=$(load_payload 2>/dev/null) || fail "NEURON_DEVICES is not a list like 0,1: $NEURON_DEVICES"

wait_until "$load_timeout" is_activated "the neuron's activation is not ready"
wait_until "$load_timeout" is_loaded "$model is not loaded"
say "$model is loaded"
ask
echo "$body"
content=$(value "a text" '.choices[0].message.content | strings') || exit 1
say "answer: $content"
if [[ ${content,,} != *paris* ]]; then fail "the answer does not name Paris"; fi
say PASS
