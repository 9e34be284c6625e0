#!/bin/bash
# Trains on several machines of a Slurm cluster. Shared storage holds the checkout, the data and the
# output; what stands behind the script goes to tools/train_net.py.
#
#   sbatch --nodes 4 tools/slurm_train.sh --config-file CONFIG --output /shared/runs/base_3x
#
# A job that is requeued, or that lost a process, continues from its last checkpoint.

#SBATCH --job-name focalnet_det
#SBATCH --nodes 1
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output slurm-%j.log

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the root of the checkout}"

PYTHON=${PYTHON:-.venv/bin/python}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun per machine; it starts one process per GPU.
exec srun --kill-on-bad-exit=1 "$PYTHON" -m torch.distributed.run \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node gpu --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
  tools/train_net.py --resume "$@"
