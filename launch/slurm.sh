#!/usr/bin/env bash
# A run on a SLURM cluster, one process a GPU. Everything after the script's name goes to `mtl train`. From a checkout
# or from wherever the package is installed (mtl --help says where this file is then):
#   sbatch --nodes=2 launch/slurm.sh --config configs/quickstart.yaml --set engine.zero=3
# Submitted again it goes on from the newest checkpoint (set checkpoint.every). Three minutes before its time is up,
# or when it is preempted, it saves, ends with code 75 and is queued again.
#SBATCH --job-name=coba-mtl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
# Seconds before the end at which the run saves: more than a full validation pass and a save take.
#SBATCH --signal=USR1@180
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# Not --gpus-per-task: a process picks its GPU by SLURM_LOCALID among all of its node's.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}

# The data are encoded by one process before the others hold their GPUs; where they are already, this takes seconds.
srun --nodes=1 --ntasks=1 "$PYTHON" -m mtl.cli check --prepare "$@"

# SLURM's variables tell each process its rank (mtl/process.py). One that fails ends all.
set +e
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" "$PYTHON" -m mtl.cli train --resume "$@"
code=$?
if ((code == 75)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
