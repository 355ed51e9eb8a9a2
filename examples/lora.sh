#!/bin/sh
# The life of an adapter while the server runs, with nothing but curl. The server must allow it:
#     cadenza serve smollm2 --enable-lora --admin-api-key SECRET --lora-allowed-roots tests/data
# Usage: CADENZA_ADMIN_API_KEY=SECRET sh examples/lora.sh [http://127.0.0.1:8000 [FOLDER-BELOW-A-ROOT]]
set -eu
URL="${1:-http://127.0.0.1:8000}"
FOLDER="${2:-emoji_bot}"
KEY="${CADENZA_API_KEY:-none}"
ADMIN_KEY="${CADENZA_ADMIN_API_KEY:-$KEY}"

send() { # send KEY PATH BODY
    curl --silent --show-error --fail-with-body "$URL$2" \
        -H "Authorization: Bearer $1" -H "Content-Type: application/json" -d "$3"
    echo
}
ask() { # ask FIELDS
    send "$KEY" /v1/completions '{
        "prompt": "Someone stole my wallet!", "temperature": 0, "max_tokens": 8, '"$1"'}'
}

echo "# Loaded, under a name that must be new"
send "$ADMIN_KEY" /v1/load_lora_adapter '{"lora_name": "mood", "lora_path": "'"$FOLDER"'", "expected_generation": 0}'

echo "# Whoever asks may name it, or half of it"
ask '"model": "mood"'
ask '"lora": [{"id": "mood", "scale": 0.5}]'

echo "# Replaced while it is in use: nobody waits, and who has begun with the old one ends with it"
send "$ADMIN_KEY" /v1/load_lora_adapter '{"lora_name": "mood", "lora_path": "'"$FOLDER"'", "load_inplace": true}'

echo "# Only if nobody else has changed it meanwhile: a 409 otherwise"
send "$ADMIN_KEY" /v1/load_lora_adapter '{"lora_name": "mood", "lora_path": "'"$FOLDER"'", "expected_generation": 1}' ||
    true

echo "# What there is"
curl --silent --show-error --fail "$URL/v1/lora_adapters" -H "Authorization: Bearer $KEY"
echo

echo "# Taken away"
send "$ADMIN_KEY" /v1/unload_lora_adapter '{"lora_name": "mood"}'
ask '"model": "mood"' || true
