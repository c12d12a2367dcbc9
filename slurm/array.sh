#!/usr/bin/env bash
# Many tiles shared out over a job array: each job runs SCRIPT ... shard=i/n with i its number and n their count.
#
#   python downstream.py configs/downstream.yaml --check                  first: what is there to do
#   sbatch --array=1-16 slurm/array.sh downstream.py infer configs/downstream.yaml [key=value ...]
#   sbatch --array=1-16 --gres=gpu:a40:1 --mem=64G slurm/array.sh downstream.py infer configs/downstream.yaml
#   SHARDS=16 sbatch --array=3 slurm/array.sh downstream.py infer configs/downstream.yaml      one of them again
#   python downstream.py merge configs/downstream.yaml                    when all are done; it says if one is not
#   sbatch --array=1-64 slurm/array.sh infer.py s3://bucket/plates out=s3://mine/cells      images; a table for each shard
#
# Two minutes before the time is up, Slurm sends SIGUSR1: the script ends with its tile and exits with 85, and the
# job queues itself again; it goes on with the next tile. The same after preemption (SIGTERM).
#SBATCH --job-name=dinocell-array
#SBATCH --partition=gpu
#SBATCH --gres=gpu:a100:1
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.log

set -uo pipefail
usage="usage: sbatch --array=1-16 slurm/array.sh SCRIPT.py [WORDS ...] [key=value ...]"
[ $# -ge 2 ] || { echo "$usage"; exit 2; }
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || { echo "error: no job array; $usage"; exit 2; }
if [ "$SLURM_ARRAY_TASK_MIN" -ne 1 ] || [ "$SLURM_ARRAY_TASK_MAX" -ne "$SLURM_ARRAY_TASK_COUNT" ]; then
    # --array=3 alone, to do a shard again: the count must come from the first time
    [ -n "${SHARDS:-}" ] || { echo "error: --array does not run from 1 to n; say SHARDS=n sbatch --array=..."; exit 2; }
fi
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
[ -f "$1" ] || { echo "error: $1 is not in $PWD; submit from the repository's folder"; exit 2; }
[ -n "${VENV:-}" ] && . "$VENV/bin/activate"              # VENV=/path/to/venv sbatch ...
mkdir -p runs

# srun, not python alone: it hands on the signal that Slurm sends to steps
srun --ntasks=1 python "$@" "shard=$SLURM_ARRAY_TASK_ID/${SHARDS:-$SLURM_ARRAY_TASK_COUNT}"
code=$?
if [ "$code" -eq 85 ]; then
    echo "stopped before the end; queued again"
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
