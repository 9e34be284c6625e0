#!/bin/bash
# Trains on several machines of a Slurm cluster. Shared storage holds the checkout, the data and the
# output; what stands behind the script goes to tools/train_net.py.
#
#   sbatch --nodes 4 tools/slurm_train.sh --config-file CONFIG --output /shared/runs/base_3x
#
# Two minutes before its time is up Slurm sends SIGUSR1. The training then finishes its iteration,
# saves and exits with code 75, and the job is requeued; it continues from its last checkpoint.
# A process that is killed (exit code above 128) costs a restart, at most RESTARTS (3) in a job;
# bad input and defects (exit code 1) end the job.
#
# PYTHON and PORT (29500) may be set in the environment.

#SBATCH --job-name focalnet_det
#SBATCH --nodes 1
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal B:USR1@120
#SBATCH --open-mode append
#SBATCH --output slurm-%j.log

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the root of the checkout}" || exit 1

export PYTHON=${PYTHON:-.venv/bin/python}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export DIST_URL=tcp://$first:${PORT:-29500}
stopped=

# SIGUSR1 and SIGTERM reach this script alone; srun passes on to the training what it gets.
stop() {
  stopped=1
  [ -z "${step:-}" ] || kill -USR1 "$step" 2>/dev/null
}
trap stop USR1 TERM

# A task per machine starts a process per GPU. The machine's number is known in the task alone.
train() {
  srun --kill-on-bad-exit=0 bash -c 'exec "$PYTHON" tools/train_net.py --resume \
    --num-gpus "${SLURM_GPUS_ON_NODE:-1}" --num-machines "$SLURM_JOB_NUM_NODES" \
    --machine-rank "$SLURM_NODEID" --dist-url "$DIST_URL" "$@"' train "$@" &
  step=$!
  # A trapped signal ends `wait` early, with a code above 128.
  while :; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
  done
  step=
}

for ((left = ${RESTARTS:-3}; ; left--)); do
  code=75
  [ -n "$stopped" ] || train "$@"
  if [ "$code" -le 128 ] || [ "$code" -eq 130 ] || [ -n "$stopped" ] || [ "$left" -le 0 ]; then
    break
  fi
  echo "A process was killed (exit code $code): going on from the last checkpoint." >&2
done

if [ "$code" -eq 75 ] || { [ -n "$stopped" ] && [ "$code" -ne 0 ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
