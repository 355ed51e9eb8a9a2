#!/bin/sh
# Asks a running server (`cadenza serve smollm2`) with nothing but curl.
# Usage: sh examples/curl.sh [http://127.0.0.1:8000]
set -eu
URL="${1:-http://127.0.0.1:8000}"
KEY="${CADENZA_API_KEY:-none}"

ask() { # ask PATH BODY
    curl --silent --show-error --no-buffer --fail-with-body "$URL$1" \
        -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" -d "$2"
    echo
}

echo "# A chat answer"
ask /v1/chat/completions '{
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0, "max_tokens": 20
}'

echo "# The same as a stream of server-sent events"
ask /v1/chat/completions '{
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0, "max_tokens": 20, "stream": true, "stream_options": {"include_usage": true}
}'

echo "# Two continuations of a text, the same ones every time"
ask /v1/completions '{
    "prompt": "Once upon a time", "n": 2, "max_tokens": 16, "temperature": 0.8, "min_p": 0.1, "seed": 42
}'

echo "# How likely is this text? Log-probabilities of the prompt, nothing generated"
ask /v1/completions '{
    "prompt": "The capital of France is Paris.", "echo": true, "logprobs": 0, "max_tokens": 0
}'

echo "# What a mistake looks like"
ask /v1/chat/completions '{
    "messages": [{"role": "user", "content": "Hi"}], "temperature": -1
}' || true
