#!/bin/sh
# Trains GPT-2 124M from scratch on 10 billion tokens of FineWeb, with the flags of karpathy/llm.c's
# reproduction. Started again, it resumes from its newest checkpoint.
#
#   dev/scripts/gpt2_124M.sh                        103 shards (20 GB), 19,560 steps of 524,288 tokens
#   SHARDS=1 STEPS=20 dev/scripts/gpt2_124M.sh      a first look; more flags of ./train_gpt2 may follow
#
# Uses ./train_gpt2cu if it is built. On a CPU, at 1,000 tokens/s, 10 billion tokens take four months; the
# binary prints the remaining time after the first step.
set -eu
cd "$(dirname "$0")/../.."
python3 dev/data/fetch.py fineweb --shards "${SHARDS:-103}"
[ -f dev/data/hellaswag/hellaswag_val.bin ] || python3 dev/data/fetch.py hellaswag
binary=./train_gpt2
micro_batch=4
if [ -x ./train_gpt2cu ]; then
    binary=./train_gpt2cu
    micro_batch=64
fi
exec "$binary" \
    -i 'dev/data/fineweb10B/fineweb_train_*.bin' -j 'dev/data/fineweb10B/fineweb_val_*.bin' \
    -e d12 -o "${OUT:-runs/gpt2_124M}" -b "$micro_batch" -t 1024 -d 524288 -x "${STEPS:-19560}" \
    -l 6e-4 -q 0 -u 700 -c 0.1 -v 250 -m 20 -s 20000 -h "${HELLASWAG:-1}" -n 5000 -y 1 "$@"
