#!/usr/bin/env bash
# Pretrain on a Slurm cluster, from the repository's folder:
#   sbatch --nodes 8 examples/slurm.sh --config examples/base_pp.yaml \
#     --data.train /data/shards/wikipedia --train.output /runs/base_pp
# Ten minutes before the time limit the run saves and ends, and the job goes back into the queue. What resumes
# it is the same command line; after the last step the script ends without requeueing.
#SBATCH --job-name=metro
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
set -euo pipefail

# sed reads all of it: to a reader that ends early, scontrol's end would be the script's.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export OMP_NUM_THREADS=8
# Sequence parallelism overlaps communication as intended only with one queue to the GPU.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Processes that torchrun starts again would look for those before in the store that it shares with them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

save_and_requeue() {
  kill -TERM "$srun_pid"
  wait "$srun_pid" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap save_and_requeue TERM

source .venv/bin/activate
srun torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${GPUS_PER_NODE:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "$first_node:${PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
  --max-restarts 3 --shutdown-timeout 540 \
  pretrain_metro.py "$@" &
srun_pid=$!
wait "$srun_pid"
