#!/usr/bin/env bash
# The same command on every node, with the rank of the node:
#
#   MASTER_ADDR=node0 NODES=2 NODE_RANK=0 scripts/examples/train_nodes.sh --config paper --robust --model /models/InternVL2-8B --data train.jsonl
#   MASTER_ADDR=node0 NODES=2 NODE_RANK=1 scripts/examples/train_nodes.sh --config paper --robust --model /models/InternVL2-8B --data train.jsonl
#
# PROCESSES is the number of GPUs of a node (by default all), MASTER_PORT a free port of the first one.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110} # seconds for the checkpoint at SIGTERM

exec torchrun \
  --nnodes="${NODES:-1}" \
  --node_rank="${NODE_RANK:-0}" \
  --nproc_per_node="${PROCESSES:-gpu}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="${MASTER_PORT:-29500}" \
  "$(dirname "$0")/../train.py" "$@"
