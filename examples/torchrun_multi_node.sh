#!/usr/bin/env bash
# Pretrain on several machines without a scheduler. Run the same line on every one of them:
#   NODES=4 FIRST_NODE=10.0.0.1 examples/torchrun_multi_node.sh --config examples/base.yaml \
#     --data.train /data/shards/wikipedia --train.output /shared/runs/base
# The run folder and the shards must be on storage that all machines see.
set -euo pipefail
: "${NODES:?number of machines}" "${FIRST_NODE:?address of the first machine}"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Processes that torchrun starts again would look for those before in the store that it shares with them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
  --nnodes "$NODES" --nproc-per-node "${GPUS_PER_NODE:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "$FIRST_NODE:${PORT:-29500}" --rdzv-id "${RUN_ID:-metro}" \
  --max-restarts 3 --shutdown-timeout 540 \
  pretrain_metro.py "$@"
